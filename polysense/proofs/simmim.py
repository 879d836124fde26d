"""SimMIM draws large hidden squares of unseen photographs better than their surroundings would; small squares are easier, and teach no more.

The same model with cells of one patch is trained beside it: hidden pixels then lie beside visible ones and are guessed with a smaller error,
while a linear layer on its frozen features does not gain, which is why the paper hides large cells. Both are noted. Sizes are a first guess.

As filed, it draws better than the mean colour, and a shade worse than copying the nearest visible patch: the steps are too few for its window
attention to reach what lies around a hidden square.
"""
import torch
from torch import Tensor

from polysense.nn.masking import masking_of
from polysense.proofs.arms import Arm
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import learned, nearest, photos, probed, visible_mean
from polysense.systems.selfsup import simmim

METRIC = "mean absolute error of the pixels of hidden 16 px squares of unseen photographs of 64 px (normalised), 250 steps of 32"
HIGHER_IS_BETTER = False
DATA = "tiny_imagenet40 (4,000 training photographs of 64 px, 800 unseen)"


@torch.inference_mode()
def errors(arm: Arm, image: Tensor, seed: int) -> dict[str, float]:
    """Mean absolute error at the same hidden pixels: the model, and the guesses that need none."""
    system, sums = arm.subject.system, dict[str, float]()
    torch.manual_seed(seed)
    for some in image.split(100):
        masking = masking_of(system.masking(some).mask)
        drawn, truth = system.pairs(some, masking)
        values = system.target.patches(some)
        colours = visible_mean(values.unflatten(-1, (-1, 3)).mean(-2), masking.mask).repeat(1, 1, values.shape[-1] // 3)
        for name, guess in (("SimMIM", drawn), ("mean colour of what is visible", masking.at_hidden(colours)),
                            ("nearest visible patch", masking.at_hidden(nearest(values, masking.mask)))):
            sums[name] = sums.get(name, 0.0) + float((guess - truth).abs().mean()) * len(some) / len(image)
    return sums


def run(seed: int) -> Outcome:
    preset = simmim.tiny().but(**{"config.encoder.base": 32})
    image, unseen, train = photos(preset, 4000, seed)
    large = learned("simmim", preset, image, 250, seed, batch_size=32)
    small = learned("simmim", preset.but(**{"config.sampler.side": 1}), image, 250, seed, batch_size=32)
    found, easy = errors(large, unseen, seed), errors(small, unseen, seed)
    return Outcome(found.pop("SimMIM"), found, {
        "error with cells of one patch": easy["SimMIM"], "linear probe, cells of 16 px": probed(large.subject, train),
        "linear probe, cells of one patch": probed(small.subject, train)})
