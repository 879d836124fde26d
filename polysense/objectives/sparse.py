"""Sparse vectors over a vocabulary: what keeps them sparse."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from torch import Tensor

from polysense.objectives.spread import gather, places


def flops(weights: Tensor) -> Tensor:
    """sum_k (mean_i |w_ik|)^2 over the global batch, weights [B,V]: the expected work of a dot product of two of them through an inverted index
    (Paria et al. 2020; Chen et al. 2023, STAIR, equation 4). Scalar, the same on every rank."""
    mean = gather(weights.float().abs().mean(0, keepdim=True) * (len(weights) / places(weights).total)).sum(0)
    return mean.square().sum()
