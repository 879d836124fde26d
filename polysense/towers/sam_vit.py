"""SAM's image encoder. Shapes: B batch, h w patch grid, D width, C width of the neck, S side of a window, N heads, H head width."""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention, attend, lowered
from polysense.nn.drop import residual
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm, LayerNorm2d
from polysense.nn.patch import Patches
from polysense.nn.relative import along
from polysense.towers.encoded import Encoded, Tower


class GridAttention(Attention):
    """Self-attention on a grid with decomposed relative positions: q_i . (row[y_i - y_j] + column[x_i - x_j]) is added to the score of
    places i and j (Li et al. 2022, MViTv2, equation 4)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        side: int = 0                        # of the grid or window that is attended over

    def __init__(self, c: Config):
        super().__init__(c)
        self.rows, self.columns = (nn.Parameter(torch.zeros(2 * c.side - 1, self.head_width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x [B,h,w,D] -> [B,h,w,D]."""
        grid, x = x.shape[1:3], lowered(x)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4) for f in (self.q, self.k, self.v))      # [B,N,h,w,H]
        bias = torch.einsum("bnyxc,ykc->bnyxk", q, along(self.rows, grid[0], grid[0]).to(q.dtype))[..., None] \
            + torch.einsum("bnyxc,xkc->bnyxk", q, along(self.columns, grid[1], grid[1]).to(q.dtype))[..., None, :]
        mixed = attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), bias.flatten(4, 5).flatten(2, 3))
        return self.out(mixed.transpose(1, 2).flatten(2)).unflatten(1, grid)


def windows(x: Tensor, side: int) -> Tensor:
    """[B,h,w,D] -> [B*n,side,side,D], padded with zeros at the lower and right edge."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    return x.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3).flatten(0, 2)


def joined(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `windows`: [B*n,side,side,D] -> [B,h,w,D]."""
    side = x.shape[1]
    rows, columns = (-(-n // side) for n in grid)
    x = x.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return x[:, :grid[0], :grid[1]]


class Block(Part):
    """Pre-norm block on a grid. `window` 0: attention over the whole grid."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        heads: int
        hidden: int
        side: int
        window: int
        eps: float
        drop_path: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(LayerNorm.Config(width=c.width, eps=c.eps)) for _ in range(2))
        self.attn = GridAttention(GridAttention.Config(width=c.width, heads=c.heads, side=c.window or c.side))
        self.mlp = MLP(MLP.Config(width=c.width, hidden=c.hidden))
        self.window, self.drop_path = c.window, c.drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.look, self.drop_path, self.training)
        return residual(x, lambda x: self.mlp(self.norm2(x)), self.drop_path, self.training)

    def look(self, x: Tensor) -> Tensor:
        x, size = self.norm1(x), (x.shape[1], x.shape[2])
        return joined(self.attn(windows(x, self.window)), size) if self.window else self.attn(x)


class Neck(Part):
    """norm2(conv3x3(norm1(conv1x1(x)))), both without bias (ViTDet, Li et al. 2022)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int

    def __init__(self, c: Config):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c.into, c.out, 1, bias=False), nn.Conv2d(c.out, c.out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = (LayerNorm2d(LayerNorm2d.Config(width=c.out)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class SamViT(Tower):
    """A plain ViT whose blocks attend within windows, but for a few that attend to the whole grid, and a convolutional neck
    (Kirillov et al. 2023, appendix A; Li et al. 2022, ViTDet). No class token. Pictures have exactly `image_size`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        image_size: int = 1024
        patch: int = 16
        body: int = 768                      # width of the blocks
        depth: int = 12
        heads: int = 12
        hidden: int = 0                      # of the MLPs; 0: four times the width
        window: int = 14
        whole: tuple[int, ...] = (2, 5, 8, 11)         # numbers of the blocks that attend to the whole grid
        width: int = 256                     # of what comes out of the neck
        eps: float = 1e-6
        drop_path: float = 0.0               # of the last block; grows linearly from 0 at the first

    def __init__(self, c: Config):
        super().__init__()
        if c.image_size % c.patch or any(not 0 <= i < c.depth for i in c.whole):
            raise UserError(f"image_size={c.image_size} with patch={c.patch}, or whole={c.whole} with depth={c.depth}, do not go together",
                            "the patch divides the picture, and blocks are counted from 0")
        side = c.image_size // c.patch
        self.size, self.width = c.image_size, c.width
        self.patch = Patches(3, c.body, c.patch)
        self.position = nn.Parameter(torch.randn(1, side, side, c.body) * 0.02)
        self.blocks: Any = nn.ModuleList(Block(Block.Config(
            width=c.body, heads=c.heads, hidden=c.hidden or 4 * c.body, side=side, window=0 if i in c.whole else c.window, eps=c.eps,
            drop_path=c.drop_path * i / max(1, c.depth - 1))) for i in range(c.depth))
        self.neck = Neck(Neck.Config(into=c.body, out=c.width))
        for m in self.blocks.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def map(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,C,h,w]. Raises UserError for another size than `image_size`."""
        x = self.patch(image)
        if image.shape[-2:] != (self.size, self.size):
            raise UserError(f"an image of {image.shape[-2]}x{image.shape[-1]} pixels", f"this tower reads {self.size}x{self.size}")
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def dense(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,C]."""
        return self.map(image).permute(0, 2, 3, 1)

    def forward(self, image: Tensor) -> Encoded:
        """image [B,3,H,W] -> tokens [B,h*w,C] and their mean [B,C]."""
        tokens = self.map(image).flatten(2).transpose(1, 2)
        return Encoded(tokens=tokens, pooled=tokens.mean(1))
