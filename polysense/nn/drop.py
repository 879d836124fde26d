"""Noise on the residual branches."""
import torch
from torch import Tensor


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Sets whole samples of x [B,...] to zero with probability `rate` and scales the rest by 1/(1-rate) (Huang et al. 2016, stochastic depth)."""
    if not rate or not training:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)
