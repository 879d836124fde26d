"""Swin over clips. Shapes: B batch, F frames, T H W places of a map (a picture is a map of T = 1), D width, N heads, W windows of t m m places."""
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.drop import residual
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.patch import Patches
from polysense.towers.encoded import Encoded, Tower
from polysense.towers.swin import APART, Fill, born_small, ladder

Three = tuple[int, int, int]


def offsets3d(window: Three) -> Tensor:
    """[V,V] for the V places of a window: the row of the table for each (query, key)."""
    at = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None]
    t, h, w = (apart[i] + window[i] - 1 for i in range(3))
    return (t * (2 * window[1] - 1) + h) * (2 * window[2] - 1) + w


def into_cubes(x: Tensor, window: Three) -> Tensor:
    """x [B,T,H,W,D] -> [B*windows, V, D], windows in the order time, row, column."""
    for axis, n in zip((1, 3, 5), window, strict=True):
        x = x.unflatten(axis, (-1, n))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def from_cubes(x: Tensor, window: Three, size: Three) -> Tensor:
    """The inverse of `into_cubes`, for maps of `size`."""
    counts = tuple(n // w for n, w in zip(size, window, strict=True))
    x = x.unflatten(1, window).unflatten(0, (-1, *counts)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def regions3d(size: Three, window: Three, shift: Three, device: torch.device) -> Tensor:
    """[windows,1,V,V]: APART between places of a shifted map that were no neighbours before, 0 elsewhere."""
    kind = torch.zeros(size, device=device)
    for axis, (n, m, s) in enumerate(zip(size, window, shift, strict=True)):
        at = torch.arange(n, device=device)
        thirds = (at >= n - m).float() + (at >= n - s).float() if s else torch.zeros(n, device=device)
        kind = 3 * kind + thirds.view([-1 if i == axis else 1 for i in range(3)])
    kind = into_cubes(kind[None, ..., None], window)[..., 0]
    return torch.where(kind[:, :, None] == kind[:, None], 0.0, APART)[:, None]


class CubeBlock(Part):
    """x + attn(norm1(x)) within windows of t x m x m places, which every second block shifts by half a window, then x + mlp(norm2(x)) (Liu et al.
    2022, Video Swin, equation 2). `table`: the bias of each offset and head. An axis shorter than its window is one window, not shifted, whose
    offsets are those of the table's middle: so a picture, T = 1, is looked at through the rows of no offset in time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        heads: int
        window: tuple[int, int, int]
        shift: tuple[int, int, int] = (0, 0, 0)
        drop_path: float = 0.0
        mlp: Spec = field(default_factory=MLP.Config)
        norm: Spec = field(default_factory=LayerNorm.Config)

    index: Tensor

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn = build(c.norm, width=c.width), Attention(Attention.Config(width=c.width, heads=c.heads))
        self.norm2, self.mlp = build(c.norm, width=c.width), build(c.mlp, width=c.width)
        t, h, w = c.window
        self.table = nn.Parameter(torch.zeros((2 * t - 1) * (2 * h - 1) * (2 * w - 1), c.heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", offsets3d(c.window), persistent=False)
        self.window, self.shift, self.drop_path = c.window, c.shift, c.drop_path

    def forward(self, x: Tensor) -> Tensor:
        """x [B,T,H,W,D] -> the same shape; a map that windows do not divide is padded with zeros while attention looks at it."""
        x = residual(x, lambda x: self.look(self.norm1(x)), self.drop_path, self.training)
        return residual(x, lambda x: self.mlp(self.norm2(x)), self.drop_path, self.training)

    def bias(self, window: Three) -> Tensor:
        """[1,N,V,V] for a window no larger than this block's."""
        t, h, w = window
        index = self.index.view(*self.window, *self.window)[:t, :h, :w, :t, :h, :w].reshape(t * h * w, t * h * w)
        return self.table[index].permute(2, 0, 1)[None]

    def look(self, x: Tensor) -> Tensor:
        """Attention within windows: [B,T,H,W,D] -> the same shape."""
        size = x.shape[1:4]
        window: Any = tuple(min(n, m) for n, m in zip(size, self.window, strict=True))
        shift: Any = tuple(s if n > m else 0 for n, m, s in zip(size, self.window, self.shift, strict=True))
        x = F.pad(x, [0, 0, *(v for n, m in zip(reversed(size), reversed(window), strict=True) for v in (0, -n % m))])
        padded: Any = tuple(x.shape[1:4])
        moved = any(shift)
        x = torch.roll(x, tuple(-s for s in shift), (1, 2, 3)) if moved else x
        bias = self.bias(window)
        if moved:
            bias = (bias + regions3d(padded, window, shift, x.device)).repeat(len(x), 1, 1, 1)
        x = from_cubes(self.attn(into_cubes(x, window), mask=bias), window, padded)
        x = torch.roll(x, shift, (1, 2, 3)) if moved else x
        return x[:, :size[0], :size[1], :size[2]]


class Swin3D(Tower):
    """Video Swin with two ways in: cubes of `patch` for clips, squares for pictures, which pass the same blocks as a map of one time.

    Names: `patch patch_norm` (clips), `still still_norm` (pictures), `stages.{s}.merge stages.{s}.blocks.{i} norm`. Space is halved from stage to
    stage, time is not. Pooled is the mean of the last map after its norm.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        patch: tuple[int, int, int] = (2, 4, 4)
        base: int = 128                      # width of the first stage
        depths: tuple[int, ...] = (2, 2, 18, 2)
        heads: tuple[int, ...] = (4, 8, 16, 32)
        window: tuple[int, int, int] = (8, 7, 7)
        drop_path: float = 0.0               # of the last block; grows linearly from 0 at the first
        norm: Spec = field(default_factory=LayerNorm.Config)

        @property
        def width(self) -> int:
            return self.base * 2 ** (len(self.depths) - 1)

    def __init__(self, c: Config):
        super().__init__()
        if len(c.depths) != len(c.heads) or c.patch[1] != c.patch[2]:
            raise UserError(f"{len(c.depths)} depths, {len(c.heads)} numbers of heads and a patch of {c.patch}",
                            "give one of each for every stage, and patches as wide as high")
        self.patch, self.patch_norm = nn.Conv3d(3, c.base, c.patch, c.patch), build(c.norm, width=c.base)
        self.still, self.still_norm = Patches(3, c.base, c.patch[1]), build(c.norm, width=c.base)
        half: Any = tuple(n // 2 for n in c.window)
        self.stages = ladder(c, lambda width, heads, odd, rate: CubeBlock.Config(
            width=width, heads=heads, window=c.window, shift=half if odd else (0, 0, 0), norm=c.norm, drop_path=rate).build())
        self.norm, self.width, self.embedded, self.prefix = build(c.norm, width=c.width), c.width, c.base, 0
        self.times, self.stride = c.patch[0], c.patch[1] * 2 ** (len(c.depths) - 1)
        born_small(self.stages)
        self.inflate()

    @torch.no_grad()
    def inflate(self) -> None:
        """What clips need becomes what pictures have: the kernel of a patch copied along time and divided by its length, its norm, and in every table
        the rows of no offset in time copied to all offsets (Carreira & Zisserman 2017; Wang et al. 2022, BEVT, section 3.2)."""
        weight = self.still.weight[:, :, None] / self.times
        self.patch.weight.copy_(weight.expand_as(self.patch.weight))
        for mine, theirs in ((self.patch.bias, self.still.bias), *zip(self.patch_norm.parameters(), self.still_norm.parameters(), strict=True)):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        for stage in self.stages:
            for block in stage.blocks:
                rows = 2 * block.window[0] - 1
                table = block.table.unflatten(0, (rows, -1))
                block.table.copy_(table[block.window[0] - 1].expand_as(table).flatten(0, 1))

    def embed(self, pixels: Tensor, fill: Fill | None = None) -> Tensor:
        """pixels, a clip [B,F,3,H,W] or a picture [B,3,H,W] -> normed embeddings [B,T,h,w,base]. fill (mask [B,T,H',W'], token [1,1,base]): the
        token stands in for the hidden ones; a coarser mask is enlarged by repetition. Raises UserError for other shapes."""
        side = self.still.kernel_size[0]
        if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3 or pixels.shape[-1] % side or pixels.shape[-2] % side:
            raise UserError(f"pixels of shape {list(pixels.shape)}", f"this tower reads [B,3,H,W] and [B,F,3,H,W], sides multiples of {side}")
        if pixels.ndim == 5 and pixels.shape[1] % self.times:
            raise UserError(f"clips of {pixels.shape[1]} frames", f"choose a multiple of {self.times}")
        if pixels.ndim == 4:
            x = self.still_norm(self.still(pixels))[:, None]
        else:
            x = self.patch_norm(self.patch(pixels.transpose(1, 2)).permute(0, 2, 3, 4, 1))
        if fill is None:
            return x
        mask, token = fill
        mask = F.interpolate(mask.float(), x.shape[2:4], mode="nearest") > 0.5
        return torch.where(mask[..., None], token.to(x.dtype), x)

    def features(self, pixels: Tensor, fill: Fill | None = None) -> list[Tensor]:
        """The maps [B,T,h,w,D] after each stage; arguments as of `embed`."""
        x, out = self.embed(pixels, fill), list[Tensor]()
        for stage in self.stages:
            x = stage.merge(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            for block in stage.blocks:
                x = block(x)
            out.append(x)
        return out

    def forward(self, pixels: Tensor, fill: Fill | None = None) -> Encoded:
        """Tokens [B,Thw,D] (normed) and pooled [B,D]."""
        tokens = self.norm(self.features(pixels, fill)[-1]).flatten(1, 3)
        return Encoded(tokens=tokens, pooled=tokens.mean(1))
