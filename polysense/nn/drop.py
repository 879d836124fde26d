"""Noise on the residual branches: stochastic depth (Huang et al. 2016)."""
from collections.abc import Callable

import torch
from torch import Tensor


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Sets whole samples of x [B,...] to zero with probability `rate` and scales the rest by 1/(1-rate)."""
    if not rate or not training:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def residual(x: Tensor, branch: Callable[..., Tensor], rate: float, training: bool, *beside: Tensor | None) -> Tensor:
    """x + drop_path(branch(x, *beside)) for x [B,...], computed for the samples that keep the branch alone, from the same draws.

    beside: further arguments of the branch, [B,...] or [1,...] each, or None. No sample may depend on another one in the branch. Where nobody
    keeps it, it is computed all the same and counts nothing: data-parallel training waits for a gradient of every weight.
    """
    if not rate or not training or x.is_meta:            # shapes alone: nobody is drawn
        return x + branch(x, *beside)
    kept = torch.rand(len(x), device=x.device) >= rate
    rows = kept.nonzero()[:, 0]
    if len(rows) in (0, len(x)):
        return x + branch(x, *beside) * (float(len(rows) > 0) / (1 - rate))
    return added(x, rows, branch(x[rows], *(t if t is None or len(t) == 1 else t[rows] for t in beside)), 1 / (1 - rate))


def added(x: Tensor, rows: Tensor, y: Tensor, scale: float) -> Tensor:
    """x [B,...] with scale y [K,...] added to its rows [K]."""
    return x.index_add(0, rows, y.to(x.dtype), alpha=scale)
