"""Swin Transformer. Shapes: B batch, H W places of a map, D width, N heads, M side of a window, W windows of a picture."""
from collections.abc import Callable
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
from polysense.nn.relative import offsets
from polysense.towers.encoded import Encoded, Tower

Fill = tuple[Tensor, Tensor]                 # mask [B,N], True is hidden, and the token [1,1,D] that stands there instead
# added to the score of two places that only the shift has brought into one window; exp of the released -100 is too small to be multiplied fast
APART = -torch.inf


def into_windows(x: Tensor, side: int) -> Tensor:
    """x [B,H,W,D] -> [B W, M M, D], windows in the order of rows."""
    b, h, w, d = x.shape
    return x.view(b, h // side, side, w // side, side, d).transpose(2, 3).reshape(-1, side * side, d)


def from_windows(x: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `into_windows`, for maps of `size` (H, W)."""
    h, w = size
    return x.view(-1, h // side, w // side, side, side, x.shape[-1]).transpose(2, 3).reshape(-1, h, w, x.shape[-1])


def regions(size: tuple[int, int], side: int, shift: int, device: torch.device) -> Tensor:
    """[W,1,MM,MM]: APART between places of a shifted map that were no neighbours before, 0 elsewhere."""
    h, w = (_thirds(n, side, shift, device) for n in size)
    kind = into_windows((3 * h[:, None] + w)[None, :, :, None].float(), side)[..., 0]
    return torch.where(kind[:, :, None] == kind[:, None], 0.0, APART)[:, None]


def _thirds(n: int, side: int, shift: int, device: torch.device) -> Tensor:
    at = torch.arange(n, device=device)
    return (at >= n - side).long() + (at >= n - shift).long()


class WindowBlock(Part):
    """x + attn(norm1(x)) within windows of M x M places, which every second block shifts by half a window, then x + mlp(norm2(x))
    (Liu et al. 2021, equations 3 and 4). Scores have a learned bias for each head and offset (`table`, section 3.2)."""

    index: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the tower, as what follows
        heads: int = 0
        window: int = 0
        shift: int = 0
        drop_path: float = 0.0
        mlp: Spec = field(default_factory=MLP.Config)
        norm: Spec = field(default_factory=LayerNorm.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn = build(c.norm, width=c.width), Attention(Attention.Config(width=c.width, heads=c.heads))
        self.norm2, self.mlp = build(c.norm, width=c.width), build(c.mlp, width=c.width)
        self.table = nn.Parameter(torch.zeros((2 * c.window - 1) ** 2, c.heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", offsets((c.window, c.window))[1:, 1:].contiguous(), persistent=False)
        self.window, self.shift, self.drop_path = c.window, c.shift, c.drop_path

    def forward(self, x: Tensor) -> Tensor:
        """x [B,H,W,D] -> [B,H,W,D]; a map that windows do not divide is padded with zeros while attention looks at it."""
        x = residual(x, lambda x: self.look(self.norm1(x)), self.drop_path, self.training)
        return residual(x, lambda x: self.mlp(self.norm2(x)), self.drop_path, self.training)

    def look(self, x: Tensor) -> Tensor:
        """Attention within windows: [B,H,W,D] -> [B,H,W,D]."""
        h, w = x.shape[1:3]
        # a map of one window has nothing to shift into (released code)
        shift = self.shift if min(h, w) > self.window else 0
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = F.pad(x, (0, 0, 0, -w % self.window, 0, -h % self.window)) if h % self.window or w % self.window else x    # F.pad always copies
        size = (x.shape[1], x.shape[2])
        bias = self.table[self.index].permute(2, 0, 1)[None]
        if shift:
            bias = (bias + regions(size, self.window, shift, x.device)).repeat(len(x), 1, 1, 1)
        x = from_windows(self.attn(into_windows(x, self.window), mask=bias), self.window, size)[:, :h, :w]
        return torch.roll(x, (shift, shift), (1, 2)) if shift else x


class Merge(Part):
    """Half the sides, twice the width: four neighbours one behind the other (down first, then across), norm, a linear without bias."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        norm: Spec = field(default_factory=LayerNorm.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.linear = build(c.norm, width=4 * c.width), nn.Linear(4 * c.width, 2 * c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,H,W,D] -> [B,H/2,W/2,2D]; an odd side is padded."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2)) if x.shape[1] % 2 or x.shape[2] % 2 else x
        b, h, w, d = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.linear(self.norm(x))


def ladder(c: Any, block: Callable[[int, int, bool, float], nn.Module]) -> Any:
    """The stages of a Swin of base, depths, heads, norm and drop_path: between them neighbours are merged, width doubles, and drop path grows from
    block to block. block: of (width, heads, whether its windows are shifted, drop path)."""
    stages, total, done = nn.ModuleList(), sum(c.depths), 0
    for s, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
        stage = nn.Module()
        stage.merge = Merge(Merge.Config(width=c.base * 2 ** (s - 1), norm=c.norm)) if s else nn.Identity()
        stage.blocks = nn.ModuleList(block(c.base * 2 ** s, heads, bool(i % 2), c.drop_path * (done + i) / max(1, total - 1)) for i in range(depth))
        stages.append(stage)
        done += depth
    return stages


def born_small(stages: nn.Module) -> None:
    """Every linear: truncated normal of deviation 0.02, biases zero (released code)."""
    for m in stages.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Swin(Tower):
    """Stages of window blocks, each at half the size of the one before; pooled is the mean of the last map after its norm (Liu et al. 2021).

    Any size that the patch divides is read. Names: `patch patch_norm stages.{s}.merge stages.{s}.blocks.{i} norm`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        patch: int = 4
        base: int = 96                       # width of the first stage
        depths: tuple[int, ...] = (2, 2, 6, 2)
        heads: tuple[int, ...] = (3, 6, 12, 24)
        window: int = 7
        drop_path: float = 0.0               # of the last block; grows linearly from 0 at the first
        norm: Spec = field(default_factory=LayerNorm.Config)

        @property
        def width(self) -> int:
            return self.base * 2 ** (len(self.depths) - 1)

    def __init__(self, c: Config):
        super().__init__()
        if len(c.depths) != len(c.heads):
            raise UserError(f"{len(c.depths)} depths and {len(c.heads)} numbers of heads", "give one of each for every stage")
        self.patch, self.patch_norm = Patches(3, c.base, c.patch), build(c.norm, width=c.base)
        self.stages = ladder(c, lambda width, heads, odd, rate: WindowBlock.Config(
            width=width, heads=heads, window=c.window, shift=c.window // 2 if odd else 0, norm=c.norm, drop_path=rate).build())
        self.norm, self.width, self.embedded, self.prefix = build(c.norm, width=c.width), c.width, c.base, 0
        self.stride = c.patch * 2 ** (len(c.depths) - 1)             # of the last map
        born_small(self.stages)

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """image [B,3,H,W] -> the grid (h, w) of its patches, those before the first stage."""
        if image.ndim != 4:
            raise UserError(f"an image tensor of shape {list(image.shape)}", "this tower reads float [B,C,H,W]")
        side = self.patch.kernel_size[0]
        return image.shape[-2] // side, image.shape[-1] // side

    def embed(self, image: Tensor, fill: Fill | None = None) -> Tensor:
        """image [B,3,H,W] -> normed patch embeddings [B,h,w,base]. fill (mask [B,N], token [1,1,base]): the token stands in for the hidden ones."""
        x = self.patch_norm(self.patch(image))
        return x if fill is None else torch.where(fill[0].view(*x.shape[:3], 1), fill[1].to(x.dtype), x)

    def features(self, image: Tensor, fill: Fill | None = None) -> list[Tensor]:
        """image [B,3,H,W] -> the maps [B,h,w,D] after each stage. fill: see `embed`."""
        x, out = self.embed(image, fill), []
        for stage in self.stages:
            x = stage.merge(x)
            for block in stage.blocks:
                x = block(x)
            out.append(x)
        return out

    def forward(self, image: Tensor, fill: Fill | None = None) -> Encoded:
        """image [B,3,H,W] -> tokens [B,hw,D] (normed) and pooled [B,D]. fill: see `embed`. UserError for a size that the patch does not divide."""
        tokens = self.norm(self.features(image, fill)[-1]).flatten(1, 2)
        return Encoded(tokens=tokens, pooled=tokens.mean(1))

    def dense(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,D]: the normed map whose mean is `pooled`."""
        return self.norm(self.features(image)[-1])
