"""Learning without negatives: paired samples should fall into the same of K clusters, surely, and all clusters should be used.

On several ranks the mean over the batch is that of all ranks, taken before the logarithm (see spread.py).
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.spread import gather, places


def agreement(one: Tensor, two: Tensor) -> Tensor:
    """(H(q, p) + H(p, q)) / 2, mean over the batch: p, q the distributions of logits one, two [B,K] (Zhou et al. 2023, nCLIP, equation 3). Scalar."""
    at, log_p, log_q = places(one), F.log_softmax(one.float(), -1), F.log_softmax(two.float(), -1)
    return -((log_q.exp() * log_p).sum() + (log_p.exp() * log_q).sum()) / (2 * at.share)


def sharpness(logits: Tensor) -> Tensor:
    """Mean entropy of the samples' distributions, logits [B,K]: small where each is sure. Scalar."""
    at, log_p = places(logits), F.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum() / at.share


def spread_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean distribution of the global batch, logits [B,K]: large where all clusters are used. Scalar, the same on every rank."""
    mean = gather(F.softmax(logits.float(), -1).mean(0, keepdim=True) * (len(logits) / places(logits).total)).sum(0)
    return -(mean * mean.clamp(min=1e-12).log()).sum()


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: Tensor | float, iterations: int = 3) -> Tensor:
    """logits [N,K] -> probabilities [N,K], rows sum to one, that use the K prototypes evenly over the samples of all ranks (Caron et al. 2020, SwAV,
    section 3.1; Oquab et al. 2024, DINOv2): exp(logits / temperature), then in turn the columns are scaled to 1/K and the rows to 1/N each.

    A constant added to one prototype's logits is taken away by the first scaling: that is its centering. All ranks must call it.
    """
    at = places(logits)
    everyone = gather(logits.float(), at) / temperature
    if not at.total:
        return everyone
    share = (everyone - everyone.max()).exp()
    for _ in range(iterations):
        share = share / share.sum(0, keepdim=True).clamp_min(1e-30) / share.shape[1]
        share = share / share.sum(1, keepdim=True).clamp_min(1e-30) / len(share)
    return (share * len(share))[at.start:at.start + len(logits)]
