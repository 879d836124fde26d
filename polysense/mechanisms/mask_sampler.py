"""Which patches are hidden, and how a tower is kept from seeing them. Shapes: B batch, N patches of a grid, K visible, M hidden, D width.

A sampler is a part: `sampler(batch, grid, device) -> Masking`. `RandomMask` (MAE, FLIP), `CellMask` (SimMIM), `BlockMask` (BEiT), `TubeMask`
(VideoMAE). Random
numbers come from torch's global generator, which training seeds and checkpoints restore; all samples are drawn at once.
`DropHidden` and `FillHidden` are the two ways to hide: a tower reads the visible patches alone, or all of them with a learned mask token in
place of each hidden one.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, prod
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.masking import Masking, masking_by, masking_of

__all__ = ["BlockMask", "CellMask", "DropHidden", "FillHidden", "Masking", "RandomMask", "TubeMask", "masking_by", "masking_of"]

Device = torch.device | str | None


class RandomMask(Part):
    """Uniform without replacement, for each sample anew: int(N (1 - ratio)) patches stay (He et al. 2022, MAE; Li et al. 2023, FLIP)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        ratio: float = 0.75                  # share of hidden patches

    def __init__(self, c: Config):
        super().__init__()
        self.ratio = checked(c.ratio)

    def visible(self, patches: int) -> int:
        """How many of so many patches stay visible."""
        return int(patches * (1 - self.ratio))

    def forward(self, batch: int, grid: Sequence[int], device: Device = None, noise: Tensor | None = None) -> Masking:
        """batch samples of a grid such as (h, w) -> Masking. noise [B,N] in place of random numbers: the least are kept."""
        noise = torch.rand(batch, prod(grid), device=device) if noise is None else noise
        return masking_by(noise, self.visible(prod(grid)))


class CellMask(Part):
    """Uniform over square cells, larger than the tower's patches: ceil(ratio cells) of them are hidden (Xie et al. 2022, SimMIM, section 3.2).

    The size of what is hidden then does not depend on the tower: cells of 32 px are 8x8 patches of a Swin, 2x2 of a ViT of patch 16.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        ratio: float = 0.6                   # share of hidden cells
        side: int = 8                        # of a cell, in patches of the tower

    def __init__(self, c: Config):
        super().__init__()
        if c.side < 1:
            raise UserError(f"cells of {c.side} patches", "they have one at least")
        self.ratio, self.side = checked(c.ratio), c.side

    def forward(self, batch: int, grid: Sequence[int], device: Device = None, noise: Tensor | None = None) -> Masking:
        """grid (h, w) of patches -> Masking. noise [B,cells]: the greatest are hidden. UserError for a grid that cells do not divide."""
        height, width = grid
        if height % self.side or width % self.side:
            raise UserError(f"a grid of {height}x{width} patches does not divide into cells of {self.side}x{self.side}", "choose other sizes")
        h, w = height // self.side, width // self.side
        noise = torch.rand(batch, h * w, device=device) if noise is None else noise
        cells = masking_by(noise, h * w - ceil(self.ratio * h * w)).mask.view(batch, h, w)
        return masking_of(cells.repeat_interleave(self.side, 1).repeat_interleave(self.side, 2).flatten(1))


class TubeMask(Part):
    """One random spatial mask of int(ratio h w) cells for the whole clip: a hidden cell is hidden at all times (Tong et al. 2022, section 3.3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        ratio: float = 0.9

    def __init__(self, c: Config):
        super().__init__()
        self.ratio = checked(c.ratio)

    def forward(self, batch: int, grid: Sequence[int], device: Device = None, noise: Tensor | None = None) -> Masking:
        """grid (t, h, w) -> Masking over N = t h w patches, time first. noise [B,h*w]: the least are kept. keep and hidden are sorted."""
        times, cells = grid[0], prod(grid[1:])
        noise = torch.rand(batch, cells, device=device) if noise is None else noise
        frame = masking_by(noise, cells - int(self.ratio * cells))
        mask = frame.mask.repeat(1, times)
        return Masking(mask, mask.int().argsort(dim=1, stable=True), times * frame.visible)


class BlockMask(Part):
    """Rectangles until `hidden` patches are covered (Bao et al. 2022, BEiT, algorithm 1).

    Each rectangle has an area uniform in [least, what is still to be hidden] and a log-uniform aspect ratio in [aspect, 1/aspect], at a random
    place; it is taken if it hides at least one more patch and no more than are still to be hidden. After ten failures in a row a sample
    stops: it then has fewer hidden patches than asked for (`Masking.visible` is -1 unless all samples have as many). `fill`: what becomes of
    such a sample, "less" (BEiT) or "exact" (the missing patches are drawn at random, so that every sample hides `hidden`).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        hidden: int = 75                     # of 14 x 14
        least: int = 16                      # smallest area of a rectangle
        most: int | None = None              # largest; None: whatever is still to be hidden
        aspect: float = 0.3
        fill: str = "less"
        tries: int = 10                      # in a row before a sample stops

    def __init__(self, c: Config):
        super().__init__()
        if c.fill not in ("less", "exact") or c.hidden < 1 or c.least < 1 or not 0 < c.aspect <= 1:
            raise UserError(f"hidden={c.hidden}, least={c.least}, aspect={c.aspect}, fill={c.fill!r} make no block mask",
                            "counts are at least one, aspect is in (0, 1], fill is 'less' or 'exact'")
        self.c = c

    def forward(self, batch: int, grid: Sequence[int], device: Device = None, hidden: Tensor | None = None) -> Masking:
        """batch samples of a grid (h, w) -> Masking. All samples try one rectangle at a time, together. hidden [B]: how many to hide of each."""
        c, (height, width) = self.c, grid
        asked = torch.full((batch,), c.hidden, device=device) if hidden is None else hidden
        if batch and int(asked.max()) >= height * width:
            raise UserError(f"{int(asked.max())} hidden patches of a grid of {height}x{width}", "hide fewer than there are")
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
        failures = torch.zeros(batch, dtype=torch.int64, device=device)
        going = asked > 0
        while bool(going.any()):
            left = asked - mask.flatten(1).sum(1)
            high = left.clamp(max=c.most) if c.most is not None else left
            inside, fits = rectangles(c.least, high, c.aspect, height, width)
            more = (inside & ~mask).flatten(1).sum(1)
            good = going & fits & (more > 0) & (more <= high)
            mask |= inside & good[:, None, None]
            failures = torch.where(good, 0, failures + 1)
            going = going & (failures < c.tries) & (mask.flatten(1).sum(1) < asked)
        mask = mask.flatten(1)
        if c.fill == "exact":                # hidden ones first, the others in random order
            mask = torch.where(mask, -1.0, torch.rand(mask.shape, device=device)).argsort(1).argsort(1) < asked[:, None]
        return masking_of(mask)


def rectangles(least: int, high: Tensor, aspect: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """One random rectangle for each sample, of an area uniform in [least, high [B]] and a log-uniform aspect ratio in [aspect, 1/aspect], at a random
    place: what lies inside it [B,H,W], and whether it is smaller than the grid [B] (where not, it is none)."""
    row, column = torch.arange(height, device=high.device)[:, None], torch.arange(width, device=high.device)
    area, turn, down, across = torch.rand(4, len(high), device=high.device)
    area = least + (high - least) * area
    ratio = torch.exp(log(aspect) * (1 - 2 * turn))
    h, w = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    top, start = (down * (height - h + 1)).long(), (across * (width - w + 1)).long()
    inside = (row >= top[:, None, None]) & (row < (top + h)[:, None, None]) & (column >= start[:, None, None]) & (column < (start + w)[:, None, None])
    return inside, (h < height) & (w < width)


class DropHidden(Part):
    """The tower computes the visible patches alone: `tower(pixels, keep=masking.keep)` (MAE, VideoMAE, FLIP)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # taken from the owner, not used

    def __init__(self, c: Config):
        super().__init__()

    def forward(self, tower: Any, pixels: Tensor, masking: Masking) -> Tensor:
        """pixels -> the tower's tokens [B, prefix + K, D], visible patches in the order of `masking.keep`."""
        return tower(pixels, keep=masking.keep).tokens


class FillHidden(Part):
    """The tower computes every patch, with one learned `token [1,1,D]` in place of each hidden patch embedding, before positions are added:
    `tower(pixels, fill=(masking.mask, token))` (BEiT, SimMIM, iBOT)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, c.width) * c.std)

    def forward(self, tower: Any, pixels: Tensor, masking: Masking) -> Tensor:
        """pixels -> the tower's tokens [B, prefix + N, D]."""
        return tower(pixels, fill=(masking.mask, self.token)).tokens


def checked(ratio: float) -> float:
    """A share of hidden patches, or UserError."""
    if not 0 <= ratio < 1:
        raise UserError(f"a masking ratio of {ratio}", "it lies in [0, 1)")
    return ratio
