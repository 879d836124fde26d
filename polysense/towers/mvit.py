"""Multiscale ViT over clips. Shapes: B batch, F frames, T tokens of a grid (t, h, w) behind the class token, D width, N heads, H head width."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import attend, lowered
from polysense.nn.check import check_video
from polysense.nn.drop import drop_path
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.relative import along
from polysense.towers.encoded import Encoded, Tower

Grid = tuple[int, int, int]
Fill = tuple[Tensor, Tensor]                 # mask [B,N] over the last grid, True is hidden, and the token [1,1,D] that stands there instead
PLACES = ("attention", "mlp")


def over(pool: Callable[[Tensor], Tensor], x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """`pool` of maps [B,H,t,h,w] over the tokens of a grid, x [B,N,1+T,H], and the grid that it leaves; the class token stays as it is."""
    maps = pool(x[:, :, 1:].flatten(0, 1).mT.unflatten(-1, grid))
    t, h, w = maps.shape[2:]
    return torch.cat([x[:, :, :1], maps.flatten(2).mT.unflatten(0, x.shape[:2])], 2), (t, h, w)


def norm(width: int, eps: float) -> LayerNorm:
    return LayerNorm(LayerNorm.Config(width=width, eps=eps))


class Pool(Part):
    """A 3x3x3 convolution of every channel of a head by itself, which all heads share, and a norm (Fan et al. 2021, MViT, section 3.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int                           # of a head
        step: int = 1                        # places down and across from one to the next
        eps: float = 1e-6

    def __init__(self, c: Config):
        super().__init__()
        self.conv = nn.Conv3d(c.width, c.width, 3, (1, c.step, c.step), 1, groups=c.width, bias=False)
        self.norm = norm(c.width, c.eps)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """x [B,N,1+T,H] -> the same of a coarser grid, and that grid."""
        x, grid = over(self.conv, x, grid)
        return self.norm(x), grid


class PooledAttention(Part):
    """Attention whose queries, keys and values are pooled first, with scores q_i . k_j / sqrt(H) + q_i . (row[y_i - y_j] + column[x_i - x_j] +
    time[t_i - t_j]); the pooled queries are added to what comes out (Li et al. 2022, MViTv2, section 4.1). The class token has no place, and
    nothing is added to it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        width: int
        heads: int
        grid: Grid                           # of what comes in
        step: int = 1                        # of the queries
        reach: int = 1                       # step of keys and values
        eps: float = 1e-6

    def __init__(self, c: Config):
        super().__init__()
        if c.width % c.heads:
            raise UserError(f"a width of {c.width} does not divide into {c.heads} heads", "choose a width that is a multiple of heads")
        head, self.heads = c.width // c.heads, c.heads
        self.qkv, self.out = nn.Linear(c.into, 3 * c.width), nn.Linear(c.width, c.width)
        self.pool_q, self.pool_k, self.pool_v = (Pool(Pool.Config(width=head, step=s, eps=c.eps)) for s in (c.step, c.reach, c.reach))
        side = 2 * max(c.grid[1] // c.step, c.grid[1] // c.reach) - 1
        self.rows, self.columns, self.times = (nn.Parameter(nn.init.trunc_normal_(torch.empty(n, head), std=0.02, a=-0.04, b=0.04))
                                               for n in (side, side, 2 * c.grid[0] - 1))

    def apart(self, q: Tensor, grid: Grid, keys: Grid) -> Tensor:
        """What relative places add to the scores, [B,N,1+T,1+S], of queries [B,N,1+T,H]."""
        q = q[:, :, 1:].unflatten(2, grid)                                           # B N t y x H
        when, down, across = (along(table, a, b).to(q.dtype) for table, a, b in zip((self.times, self.rows, self.columns), grid, keys, strict=True))
        bias = torch.einsum("bntyxc,tkc->bntyxk", q, when)[..., None, None] + torch.einsum("bntyxc,ykc->bntyxk", q, down)[..., None, :, None] \
            + torch.einsum("bntyxc,xkc->bntyxk", q, across)[..., None, None, :]
        return F.pad(bias.flatten(5).flatten(2, 4), (1, 0, 1, 0))

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """x [B,1+T,into] -> [B,1+T',D] and the grid of T'."""
        q, k, v = self.qkv(lowered(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, after = self.pool_q(q, grid)
        (k, keys), (v, _) = self.pool_k(k, grid), self.pool_v(v, grid)
        mixed = attend(q, k, v, self.apart(q, after, keys))
        mixed = torch.cat([mixed[:, :, :1], mixed[:, :, 1:] + q[:, :, 1:]], 2)
        return self.out(mixed.transpose(1, 2).flatten(2)), after


class PooledBlock(Part):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); where the queries are pooled the residual path takes the largest of the places between, and
    where the block widens, a dense layer of the norm (of norm1 where attention widens, of norm2 where the MLP does)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        heads: int
        grid: Grid
        step: int = 1
        reach: int = 1
        widens: str = "mlp"
        eps: float = 1e-6
        drop_path: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        self.early, self.drop_path = c.widens == "attention", c.drop_path
        width = c.out if self.early else c.into
        self.norm1, self.norm2 = norm(c.into, c.eps), norm(width, c.eps)
        self.attn = PooledAttention(PooledAttention.Config(
            into=c.into, width=width, heads=c.heads, grid=c.grid, step=c.step, reach=c.reach, eps=c.eps))
        self.mlp = MLP(MLP.Config(width=width, out=c.out))
        self.project = nn.Linear(c.into, c.out) if c.into != c.out else None
        near, edge = c.step + 1, (c.step + 1) // 2
        self.largest = nn.MaxPool3d((1, near, near), (1, c.step, c.step), (0, edge, edge)) if c.step > 1 else None

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """x [B,1+T,into] -> [B,1+T',out] and the grid of T'."""
        seen = self.norm1(x)
        mixed, after = self.attn(seen, grid)
        if self.project is not None and self.early:
            x = self.project(seen)
        if self.largest is not None:
            x = over(self.largest, x[:, None], grid)[0][:, 0]
        x = x + drop_path(mixed, self.drop_path, self.training)
        seen = self.norm2(x)
        if self.project is not None and not self.early:
            x = self.project(seen)
        return x + drop_path(self.mlp(seen), self.drop_path, self.training), after


class MViT(Tower):
    """MViTv2 (Li et al. 2022): overlapping cubes, then blocks whose grid grows coarser as they grow wider, relative positions, a class token.

    `grid` is the last one, on which masks are drawn. What the first convolution reads of a token overlaps its neighbours' by `margin`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        image_size: int = 224
        frames: int = 16
        base: int = 96                       # width of the first block
        depth: int = 16
        heads: int = 1                       # of the first block
        doubled: tuple[int, ...] = (1, 3, 14)          # blocks from which on there are twice as many heads and channels
        halved: tuple[int, ...] = (1, 3, 14)           # blocks that halve the grid down and across
        reach: int = 8                       # step of keys and values in the first block; it shrinks as the grid does
        widens: str = "attention"            # which half of a block makes it wider: "mlp" does so a block earlier (MViTv1, MaskFeat)
        channels: int = 3
        eps: float = 1e-6
        drop_path: float = 0.0               # of the last block; grows linearly from 0 at the first

        @property
        def width(self) -> int:
            return self.base << len(self.doubled)

    def __init__(self, c: Config):
        super().__init__()
        coarse = 4 << len(c.halved)
        if c.image_size % coarse or c.frames % 2 or c.widens not in PLACES or any(not 0 < i < c.depth for i in (*c.doubled, *c.halved)):
            raise UserError(f"{c.frames} frames of {c.image_size} pixels, widens={c.widens!r}, doubled={c.doubled} and halved={c.halved} of "
                            f"{c.depth} blocks do not go together",
                            f"frames are even, {coarse} divides the side, widens is {' or '.join(PLACES)}, and the first block stays as it is")
        side = c.image_size // 4
        self.image_size, self.frames, self.width, self.embedded, self.prefix, self.margin = c.image_size, c.frames, c.width, c.base, 1, (1, 3)
        self.first, self.grid = (c.frames // 2, side, side), (c.frames // 2, c.image_size // coarse, c.image_size // coarse)
        self.patch = nn.Conv3d(c.channels, c.base, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        self.cls = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, c.base), std=0.02, a=-0.04, b=0.04))
        blocks, into, early = list[PooledBlock](), c.base, c.widens == "attention"
        for i in range(c.depth):
            finer, times = sum(n < i for n in c.halved), sum(n <= i for n in c.doubled)
            out = c.base << (times if early else sum(n <= i + 1 for n in c.doubled))
            blocks.append(PooledBlock(PooledBlock.Config(
                into=into, out=out, heads=c.heads << times, grid=(c.frames // 2, side >> finer, side >> finer), step=2 if i in c.halved else 1,
                reach=max(1, c.reach >> sum(n <= i for n in c.halved)), widens=c.widens, eps=c.eps, drop_path=c.drop_path * i / max(1, c.depth - 1))))
            into = out
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = norm(c.width, c.eps)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Conv3d):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def grid_of(self, video: Tensor) -> Grid:
        """video [B,F,C,H,W] -> the last grid (t, h, w). Raises UserError for clips of another size than this tower reads."""
        check_video(video, self.patch.in_channels, self.frames, self.image_size)
        return self.grid

    def embed(self, video: Tensor, fill: Fill | None = None) -> Tensor:
        """video [B,F,C,H,W] -> tokens before the blocks [B,1+T,base]. fill (mask [B,N], token [1,1,base]): the token stands in wherever a place of
        the last grid is hidden."""
        self.grid_of(video)
        x = self.patch(video.transpose(1, 2)).flatten(2).mT
        if fill is not None:
            finer = self.first[1] // self.grid[1]
            mask = fill[0].unflatten(1, self.grid).repeat_interleave(finer, 2).repeat_interleave(finer, 3).flatten(1)
            x = torch.where(mask[..., None], fill[1].to(x.dtype), x)
        return torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], 1)

    def forward(self, video: Tensor, fill: Fill | None = None) -> Encoded:
        """video [B,F,C,H,W] -> tokens [B,1+N,D] (normed) and pooled [B,D], the mean of the N places. fill: see `embed`."""
        x, grid = self.embed(video, fill), self.first
        for block in self.blocks:
            x, grid = block(x, grid)
        x = self.norm(x)
        return Encoded(tokens=x, pooled=x[:, 1:].mean(1))
