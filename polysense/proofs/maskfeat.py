"""MaskFeat says which way the edges in hidden patches of unseen photographs run, better than the average and than the nearest visible patch.

Cosine of predicted and true histograms of each cell and colour channel. Noted beside it: a linear layer on its frozen features against one on
the same tower with random weights. Sizes are a first guess.
"""
import torch
from torch import Tensor

from polysense.pipeline import Pipeline
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import guessed, learned, photos, probed, smaller
from polysense.systems.selfsup import maskfeat

METRIC, HIGHER_IS_BETTER = "cosine of predicted and true HOG of hidden 8 px patches of unseen photographs of 64 px, 400 steps of 64", True
DATA = "tiny_imagenet40 (4,000 training photographs of 64 px, 800 unseen)"


def alike(one: Tensor, two: Tensor) -> float:
    """Mean cosine of the histograms [M, 3 * 9 * 4]; flat cells, which have none, are left out."""
    one, two = (x.unflatten(-1, (3, 9, -1)) for x in (one, two))
    return float(torch.cosine_similarity(one, two, dim=2)[two.norm(dim=2) > 0].mean())


def run(seed: int) -> Outcome:
    preset = smaller(maskfeat.tiny())
    image, unseen, train = photos(preset, 4000, seed)
    made = learned("maskfeat", preset, image, 400, seed)
    average = torch.stack([made.subject.system.target.whole(x).mean((0, 1)) for x in image.split(500)]).mean(0)
    found = guessed(made, unseen, average, alike, seed)
    torch.manual_seed(seed)
    blank = Pipeline(preset.config.build().eval(), preset, None, id="maskfeat")
    return Outcome(found.pop("maskfeat"), found, {"linear probe": probed(made.subject, train), "linear probe, random weights": probed(blank, train)})
