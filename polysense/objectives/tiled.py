"""Reductions over the matrix `L = scale * a @ b.T` of all pairs that never hold more than a tile of it.

Memory is linear in the number of rows and columns: what a reduction needs of L is made tile by tile and dropped. Matrices of at most
`SMALL` entries are one tile, which is kept for the backward pass; the arithmetic is the same. Half-precision features are raised to
float32 tile by tile, and autocast is off inside: a logit of 100 in bfloat16 would be wrong by a quarter.
Legend: M rows, N columns, D width.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from polysense.objectives.once import once

SMALL = 4_194_304                            # entries of L that are simply kept: 16 MB in float32
SIDE = {"cpu": 1024, "cuda": 8192}           # side of a tile: 4 MB stay in the caches of a processor; a GPU wants large products


def log_sum_exp(a: Tensor, b: Tensor, scale: Tensor | float, *, columns: bool = False, pair: int | None = None,
                hide: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise (and column-wise) log-sum-exp of `L = scale * a @ b.T`, a [M,D], b [N,D].

    Returns `(rows [M], columns [N], pairs [M])`, float32 or wider: `columns` is empty unless asked for, `pairs` holds `L[i, i + pair]`
    and is empty where `pair` is None. Entries `L[i, i + hide]` count as minus infinity. Differentiable once, in a, b and scale.
    """
    _check(a, b, pair)
    return _LogSumExp.apply(a, b, _scalar(scale, a), columns, pair, hide)


def sum_softplus(a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float, *, pair: int) -> Tensor:
    """Sum over i, j of `softplus(-z L)` with `L = scale * a @ b.T + bias` and z = 1 where `j = i + pair`, else -1. Scalar.

    The derivative of a sum of independent terms needs no second look at L: it is taken in the same pass, tile by tile.
    """
    _check(a, b, pair)
    return _SumSoftplus.apply(a, b, _scalar(scale, a), _scalar(bias, a), pair, torch.is_grad_enabled())


def _check(a: Tensor, b: Tensor, pair: int | None) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"features should be [M, D] and [N, D] with at least one row: got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise ValueError(f"features should be of one type: got {a.dtype} and {b.dtype}")
    if pair is not None and not 0 <= pair <= len(b) - len(a):
        raise ValueError(f"{len(a)} rows have no partners among columns {pair} to {pair + len(a)}: there are {len(b)}")


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scalar(x: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=_work(like), device=like.device).reshape(())


def _blocks(n: int, side: int) -> Iterator[slice]:
    return (slice(i, min(i + side, n)) for i in range(0, n, side))


class _Grid:
    """The tiles of L, with the workspace that they share."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor):
        self.a, self.b, self.scale, self.dtype = a, b, scale, _work(a)
        self.one = len(a) * len(b) <= SMALL
        side = max(len(a), len(b)) if self.one else SIDE.get(a.device.type, 1024)
        self.rows, self.columns = list(_blocks(len(a), side)), list(_blocks(len(b), side))
        self.spaces = [a.new_empty(min(side, len(a)) * min(side, len(b)), dtype=self.dtype) for _ in range(2)]

    def space(self, which: int, r: slice, c: slice) -> Tensor:
        shape = (r.stop - r.start, c.stop - c.start)
        return self.spaces[which][:shape[0] * shape[1]].view(shape)

    def left(self, r: slice) -> Tensor:
        return self.a[r].to(self.dtype)

    def right(self, c: slice) -> Tensor:
        return self.b[c].to(self.dtype)

    def logits(self, scaled: Tensor, r: slice, c: slice, hide: int | None = None) -> Tensor:
        """The tile of rows r (already scaled) and columns c, in space 0."""
        tile = torch.mm(scaled, self.right(c).T, out=self.space(0, r, c))
        if hide is not None:
            tile.diagonal(hide + r.start - c.start).fill_(float("-inf"))
        return tile


def _along(pair: int, r: slice, c: slice) -> tuple[int, slice]:
    """Offset of the diagonal `j = i + pair` inside a tile, and the rows of L that it crosses there."""
    offset = pair + r.start - c.start
    first = r.start + max(0, -offset)
    return offset, slice(first, max(first, min(r.stop, c.stop - pair)))


def _lse(tile: Tensor, space: Tensor, dim: int) -> Tensor:
    top = tile.amax(dim, keepdim=True).clamp_(min=torch.finfo(tile.dtype).min)      # a fully hidden row stays -inf, not nan
    return torch.sub(tile, top, out=space).exp_().sum(dim).log_().add_(top.squeeze(dim))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, columns: bool, pair: int | None, hide: int | None) -> tuple[Tensor, ...]:
        with torch.autocast(a.device.type, enabled=False):
            grid = _Grid(a, b, scale)
            rows = a.new_full((len(a),), float("-inf"), dtype=grid.dtype)
            cols = a.new_full((len(b) if columns else 0,), float("-inf"), dtype=grid.dtype)
            pairs = a.new_empty(0 if pair is None else len(a), dtype=grid.dtype)
            tile = scale
            for r in grid.rows:
                scaled = grid.left(r) * scale
                for c in grid.columns:
                    tile, space = grid.logits(scaled, r, c, hide), grid.space(1, r, c)
                    rows[r] = torch.logaddexp(rows[r], _lse(tile, space, 1))
                    if columns:
                        cols[c] = torch.logaddexp(cols[c], _lse(tile, space, 0))
                    if pair is not None:
                        offset, crossed = _along(pair, r, c)
                        pairs[crossed] = tile.diagonal(offset)
        ctx.save_for_backward(a, b, scale, rows, cols, tile if grid.one else scale)
        ctx.columns, ctx.pair, ctx.hide = columns, pair, hide
        return rows, cols, pairs

    @staticmethod
    @once
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor, g_pairs: Tensor) -> tuple[Any, ...]:
        """dL_ij = g_rows_i exp(L_ij - rows_i) + g_cols_j exp(L_ij - cols_j) + g_pairs_i [j = i + pair]."""
        a, b, scale, rows, cols, kept = ctx.saved_tensors
        want_a, want_b, want_scale = ctx.needs_input_grad[:3]
        with torch.autocast(a.device.type, enabled=False):
            grid = _Grid(a, b, scale)
            sums = _Sums(grid, want_a, want_b, want_scale)
            for r in grid.rows:
                left = grid.left(r)
                scaled = left * scale
                for c in grid.columns:
                    tile = kept if grid.one else grid.logits(scaled, r, c, ctx.hide)
                    d = torch.sub(tile, rows[r, None], out=grid.space(1, r, c)).exp_().mul_(g_rows[r, None])
                    if ctx.columns:
                        d.addcmul_(torch.sub(tile, cols[None, c], out=grid.space(0, r, c)).exp_(), g_cols[None, c])
                    if ctx.pair is not None:
                        offset, crossed = _along(ctx.pair, r, c)
                        d.diagonal(offset).add_(g_pairs[crossed])
                    sums.add(d, left, r, c)
            return (*sums.done(), None, None, None)


class _SumSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, pair: int, keep: bool) -> Tensor:
        wants = [keep and w for w in ctx.needs_input_grad[:4]]
        with torch.autocast(a.device.type, enabled=False):
            grid = _Grid(a, b, scale)
            sums = _Sums(grid, *wants[:3])
            totals: list[Tensor] = []
            d_bias: list[Tensor] = []
            for r in grid.rows:
                left = grid.left(r)
                scaled = left * scale
                for c in grid.columns:
                    tile = grid.logits(scaled, r, c).add_(bias)
                    true = tile.diagonal(_along(pair, r, c)[0])
                    true.neg_()
                    totals.append(torch.nn.functional.softplus(tile).sum())
                    if any(wants):
                        tile.sigmoid_()
                        true.neg_()
                        d_bias.append(tile.sum())
                        sums.add(tile, left, r, c)
            ctx.save_for_backward(*sums.done(), torch.stack(d_bias).sum() if wants[3] else None)
            return torch.stack(totals).sum()

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*(None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors), None, None)


class _Sums:
    """Adds up what a tile's dL says about a, b and scale."""

    def __init__(self, grid: _Grid, want_a: bool, want_b: bool, want_scale: bool):
        self.grid, self.want_a, self.want_scale = grid, want_a, want_scale
        by_a = want_a or (want_scale and not want_b)                 # sum(dL * L / scale) = sum(a * da) = sum(b * db): no product of its own
        self.a = torch.zeros_like(grid.a, dtype=grid.dtype) if by_a else None
        self.b = torch.zeros_like(grid.b, dtype=grid.dtype) if want_b else None

    def add(self, d: Tensor, left: Tensor, r: slice, c: slice) -> None:
        if self.a is not None:
            self.a[r].addmm_(d, self.grid.right(c))
        if self.b is not None:
            self.b[c].addmm_(d.T, left)

    def done(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grid, scale = self.grid, None
        if self.want_scale:
            sums, read, blocks = (self.a, grid.left, grid.rows) if self.a is not None else (self.b, grid.right, grid.columns)
            assert sums is not None
            scale = torch.stack([(read(s) * sums[s]).sum() for s in blocks]).sum()
        a = self.a.mul_(grid.scale).to(grid.a.dtype) if self.a is not None and self.want_a else None
        b = self.b.mul_(grid.scale).to(grid.b.dtype) if self.b is not None else None
        return a, b, scale
