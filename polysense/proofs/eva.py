"""EVA says of hidden patches of unseen photographs what CLIP says who sees them, better than the mean feature and than that of the nearest patch.

The teacher is a small CLIP of this house, trained on photographs with captions. Cosine of predicted and true features at hidden patches. The
sizes were not tuned.
"""
import torch
from torch import Tensor

from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import guessed, learned, lending, photos, small_clip, smaller, taught_by
from polysense.systems.selfsup import eva

METRIC, HIGHER_IS_BETTER = "cosine of predicted and true CLIP features of hidden patches of unseen photographs of 64 px, 300 steps of 64", True
DATA = "tiny_imagenet40 (4,000 training photographs of 64 px, 800 unseen); natural_captions (2,627 photographs with captions) for the CLIP"


def cosine(one: Tensor, two: Tensor) -> float:
    """Mean cosine of features [M,D]."""
    return float(torch.cosine_similarity(one, two, dim=-1).mean())


def run(seed: int) -> Outcome:
    clip = small_clip(seed)
    preset = taught_by(smaller(eva.tiny()), clip).but(**{"config.encoder.body.block.mlp.hidden": 256})
    image, unseen, _ = photos(preset, 4000, seed)
    made = learned("eva", preset, image, 300, seed, prepare=lending(preset, clip))
    average = torch.stack([made.subject.system.target.whole(x).mean((0, 1)) for x in image[:2000].split(500)]).mean(0)
    found = guessed(made, unseen, average, cosine, seed)
    return Outcome(found.pop("eva"), found)
