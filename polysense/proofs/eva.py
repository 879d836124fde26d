"""EVA says of hidden patches of unseen photographs what CLIP says who sees them, better than the mean feature and than that of the nearest patch.

The teacher is a small CLIP of this house, trained on photographs with captions. Cosine of predicted and true features at hidden patches. The
sizes were not tuned.
"""
import torch
from torch import Tensor

from polysense.proofs.arms import Arm
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import learned, lending, nearest, photos, small_clip, smaller, taught_by
from polysense.systems.selfsup import eva

METRIC, HIGHER_IS_BETTER = "cosine of predicted and true CLIP features of hidden patches of unseen photographs of 64 px, 300 steps of 64", True
DATA = "tiny_imagenet40 (4,000 training photographs of 64 px, 800 unseen); natural_captions (2,627 photographs with captions) for the CLIP"


@torch.inference_mode()
def agreement(arm: Arm, image: Tensor, average: Tensor, seed: int) -> dict[str, float]:
    system, sums = arm.subject.system, dict[str, float]()
    torch.manual_seed(seed)
    for some in image.split(100):
        masking = system.masking(some)
        said, truth = system.pairs(some, masking)
        for name, guess in (("EVA", said), ("mean feature", average.expand_as(truth)),
                            ("nearest visible patch", nearest(system.target.whole(some), masking.mask)[masking.mask])):
            sums[name] = sums.get(name, 0.0) + float(torch.cosine_similarity(guess, truth, dim=-1).mean()) * len(some) / len(image)
    return sums


def run(seed: int) -> Outcome:
    clip = small_clip(seed)
    preset = taught_by(smaller(eva.tiny()), clip).but(**{"config.encoder.body.block.mlp.hidden": 256})
    image, unseen, _ = photos(preset, 4000, seed)
    made = learned("eva", preset, image, 300, seed, prepare=lending(preset, clip))
    average = torch.stack([made.subject.system.target.whole(x).mean((0, 1)) for x in image[:2000].split(500)]).mean(0)
    found = agreement(made, unseen, average, seed)
    return Outcome(found.pop("EVA"), found)
