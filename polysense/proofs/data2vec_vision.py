"""data2vec predicts its own average's features of hidden patches of unseen photographs better than their mean, while these stay spread.

The score is the loss in units of that of always saying the mean target: below one, something is known of what is hidden. Noted beside it: the
spread of the targets, relative to their length, here and in an ablation that takes one layer and does not norm it, and a linear layer on the
frozen features of both. Sizes are a first guess.
"""
import torch
from torch import Tensor

from polysense.objectives.regress import masked_smooth_l1
from polysense.proofs.arms import Arm
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import learned, photos, probed, smaller
from polysense.systems.selfsup import data2vec_vision

METRIC = "smooth L1 of what is predicted of hidden patches of unseen photographs of 64 px, relative to saying the mean target, 300 steps of 64"
HIGHER_IS_BETTER = False
DATA = "tiny_imagenet40 (4,000 training photographs of 64 px, 800 unseen)"


@torch.inference_mode()
def relative(arm: Arm, image: Tensor, seed: int) -> tuple[float, float]:
    """(loss over the loss of the mean target, deviation of the targets over patches relative to their length)."""
    system, said, truth = arm.subject.system, [], []
    torch.manual_seed(seed)
    for some in image.split(100):
        one, two = system.pairs(some, system.masking(some))
        said.append(one)
        truth.append(two)
    guess, target = torch.cat(said), torch.cat(truth)
    plain = masked_smooth_l1(target.mean(0).expand_as(target), target)
    return float(masked_smooth_l1(guess, target) / plain), float(target.std(0).norm() / target.norm(dim=1).mean())


def run(seed: int) -> Outcome:
    preset = smaller(data2vec_vision.tiny())
    image, unseen, train = photos(preset, 4000, seed)
    made = learned("data2vec_vision", preset, image, 300, seed)
    bare = learned("data2vec_vision", preset.but(**{"config.target.norm": "none", "config.target.top": 1}), image, 300, seed)
    (loss, spread), (plain, shrunk) = relative(made, unseen, seed), relative(bare, unseen, seed)
    return Outcome(loss, {"the mean target": 1.0}, {
        "spread of targets": spread, "spread of targets, one layer, not normed": shrunk, "relative loss, one layer, not normed": plain,
        "linear probe": probed(made.subject, train), "linear probe, one layer, not normed": probed(bare.subject, train)})
