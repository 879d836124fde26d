"""Margin losses between two modalities: a pair should be closer than its negatives by a margin.

On several ranks each computes its own rows and columns against everyone's samples; the mean over ranks is the loss of the global batch.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
from torch import Tensor

from polysense.objectives.spread import gather, places

POLICIES = ("sum", "hardest", "semi_hard", "random")
FALLBACKS = ("none", "hardest")


def hinge(image: Tensor, text: Tensor, margin: float, policy: str, owner: Tensor, fallback: str = "none") -> Tensor:
    """Anchors of both modalities: max(0, margin + s(anchor, negative) - s(anchor, positive)), the similarity s being the cosine. Scalar.

    image, text [B,D] of any length; owner int [B]: samples of one owner (captions of one picture) are no negatives of each other. Which negatives
    count: "sum" of all (VSE), the "hardest" of the batch (Faghri et al. 2018, VSE++, equation 6), "semi_hard": the hardest among those further
    than the positive but within the margin (Schroff et al. 2015, FaceNet, section 3.2), and where there is none, `fallback`: "none", or the "hardest"
    of all; or one at "random".
    The mean over anchors of the sum of both directions.
    """
    if policy not in POLICIES or fallback not in FALLBACKS:
        raise ValueError(f"no policy {policy!r} or fallback {fallback!r}: one of {', '.join(POLICIES)}, and {' or '.join(FALLBACKS)}")
    image, text = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (image, text))
    at = places(image)
    images, texts, owners = gather(image, at), gather(text, at), gather(owner, at)
    apart, positive = owner[:, None] != owners, (image * text).sum(-1, keepdim=True)
    cost = sum(_chosen(s, positive, apart, margin, policy, fallback) for s in (image @ texts.T, text @ images.T))
    return cost.sum() / at.share  # type: ignore[union-attr]


def _chosen(similar: Tensor, positive: Tensor, apart: Tensor, margin: float, policy: str, fallback: str) -> Tensor:
    """What each anchor pays [B]: similar [B,N], positive [B,1], apart bool [B,N]: who is a negative."""
    cost = (margin + similar - positive).relu() * apart
    if policy == "sum":
        return cost.sum(1)
    if policy == "hardest":
        return cost.amax(1)
    if policy == "semi_hard":
        band = (similar < positive) & (similar > positive - margin) & apart
        chosen = (cost * band).amax(1)
        return chosen if fallback == "none" else torch.where(band.any(1), chosen, cost.amax(1))
    one = torch.rand(similar.shape, device=similar.device).masked_fill(~apart, -1.0).argmax(1, keepdim=True)
    return cost.gather(1, one)[:, 0]
