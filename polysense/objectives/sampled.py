"""Softmax over more classes than one step can afford: the classes of the batch and some others at random.

On several ranks each computes its own rows; the classes of all ranks' samples are among the candidates of every one.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.spread import gather, world


def sample_classes(label: Tensor, classes: int, count: int) -> Tensor:
    """`count` different classes in ascending order: all that occur in label [B] of the global batch (negative: none), the rest at random from the
    others. All of them where there are no more."""
    present = torch.unique(gather(label))
    present = present[present >= 0]
    if count >= classes:
        return torch.arange(classes, device=label.device)
    chance = torch.rand(classes, device=label.device)
    chance[present] = 2.0
    return chance.topk(max(count, len(present))).indices.sort().values


def margin_softmax(feature: Tensor, rows: Tensor, label: Tensor, chosen: Tensor, alpha: float, margin: float) -> Tensor:
    """-log softmax over the chosen classes of alpha (cos - margin [the true class]), mean over the samples that have a class (Wang et al. 2018,
    CosFace, equation 4). feature [B,D] and rows [C,D] of any length, label [B] (negative: none), chosen [S] ascending, with all labels among them.

    Rows that are not chosen take part in nothing and get a gradient of exactly zero. Scalar; zero where no sample has a class.
    """
    has = label >= 0
    cosine = F.normalize(feature.float(), dim=-1) @ F.normalize(rows[chosen].float(), dim=-1).T
    place = torch.searchsorted(chosen, label.clamp(min=0))
    true = F.one_hot(place.clamp(max=len(chosen) - 1), len(chosen)).to(cosine.dtype)
    loss = F.cross_entropy(alpha * (cosine - margin * true), place.clamp(max=len(chosen) - 1), reduction="none")
    return (loss * has).sum() / (gather(has.to(loss.dtype)).sum().clamp(min=1) / world()[1])
