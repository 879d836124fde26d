"""The ambient context under which objectives see the samples of all ranks; outside it every objective is local.

`train/parallel.py` alone enters it. The convention that makes gradients exact: each rank returns `sum over its own rows / (N / R)`
(N samples over R ranks), so the mean over ranks is the loss of the global batch, and the gradient averaging of data parallel training
gives its gradient: `gather` sends every row's gradient back to the rank that made the row, summed over ranks.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polysense.objectives.once import once

_group: ContextVar[Any] = ContextVar("polysense_spread_group", default=None)


@contextmanager  # pyright: ignore[reportDeprecated]
def spread(group: Any = None) -> Iterator[None]:
    """Inside, objectives count the samples of all ranks of `group` (None: of all processes). Without torch.distributed nothing changes."""
    running = dist.is_available() and dist.is_initialized()
    token = _group.set((group or dist.group.WORLD) if running else None)
    try:
        yield
    finally:
        _group.reset(token)


def world() -> tuple[int, int]:
    """(rank, number of ranks) that objectives see now; (0, 1) outside `spread`."""
    group = _group.get()
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


@dataclass(frozen=True)
class Places:
    """Where this rank's rows lie among the gathered rows: rank r holds `sizes[r]` of them."""
    sizes: tuple[int, ...]
    rank: int

    @property
    def start(self) -> int:
        return sum(self.sizes[:self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def share(self) -> float:
        """N / R: what a rank divides its sum by, so that the mean over ranks is the mean over all rows, whatever the sizes."""
        return self.total / len(self.sizes)


def places(x: Tensor) -> Places:
    """Sizes of `x` along its first dimension on all ranks (one small collective; ranks may differ)."""
    rank, ranks = world()
    if ranks == 1:
        return Places((len(x),), 0)
    sizes = torch.zeros(ranks, dtype=torch.int64, device=x.device)
    sizes[rank] = len(x)
    dist.all_reduce(sizes, group=_group.get())
    return Places(tuple(int(n) for n in sizes.tolist()), rank)


def widest(n: int, device: torch.device) -> int:
    """The largest `n` of all ranks (one small collective); `n` itself outside `spread`."""
    if world()[1] == 1:
        return n
    most = torch.tensor(n, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=_group.get())
    return int(most)


def gather(x: Tensor, at: Places | None = None) -> Tensor:
    """x [n, ...] of this rank -> [N, ...] of all ranks in rank order, differentiable (once); `x` itself outside `spread`.

    Every rank must call it. The gradient of a row is summed over ranks and returned to its owner.
    """
    at = at or places(x)
    return x if len(at.sizes) == 1 else _Gather.apply(x, at, _group.get())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Places, group: Any) -> Tensor:
        ctx.at, ctx.group = at, group
        longest = max(at.sizes)
        mine = x.contiguous()
        if len(x) < longest:                                         # collectives want equal shapes: pad, then cut
            mine = torch.cat([mine, mine.new_zeros(longest - len(x), *x.shape[1:])])
        parts = [torch.empty_like(mine) for _ in at.sizes]
        dist.all_gather(parts, mine, group=group)
        return torch.cat([p[:n] for p, n in zip(parts, at.sizes, strict=True)])

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        at, grad = ctx.at, grad.contiguous()
        if dist.get_backend(ctx.group) == "nccl" and len(set(at.sizes)) == 1:
            mine = grad.new_empty(at.sizes[at.rank], *grad.shape[1:])
            dist.reduce_scatter_tensor(mine, grad, group=ctx.group)  # pyright: ignore[reportDeprecated]
            return mine, None, None
        grad = grad.clone()                                          # autograd may share this buffer with another node
        dist.all_reduce(grad, group=ctx.group)
        return grad[at.start:at.start + at.sizes[at.rank]].contiguous(), None, None
