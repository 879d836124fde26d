"""Position embeddings of images and clips."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


def fit_positions(position: Tensor, prefix: int, grid: tuple[int, int], trained: tuple[int, int] | None = None) -> Tensor:
    """Position embeddings [1, prefix + N, D] for another grid: [1, prefix + h*w, D].

    The first `prefix` rows (class and other extra tokens) are untouched, the N patch positions are interpolated in 2-D, bicubic and
    antialiased (Dosovitskiy et al. 2021, section 3.2). `trained` is the grid they stand for, a square where not given. The same grid gives
    back the very tensor.
    """
    n = position.shape[1] - prefix
    side = round(n ** 0.5)
    trained = trained or (side, side)
    if trained[0] * trained[1] != n:
        raise UserError(f"{n} patch positions do not form a grid of {trained[0]}x{trained[1]}", "say which grid they were trained for")
    if trained == grid:
        return position
    first, patches = position[:, :prefix], position[:, prefix:]
    image = patches.float().unflatten(1, trained).permute(0, 3, 1, 2)
    image = F.interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, image.flatten(2).transpose(1, 2).to(position.dtype)], 1)


def sincos(width: int, places: Tensor, base: float = 10_000.0) -> Tensor:
    """places [N] (any unit) -> [N, width] float64: sines of `width/2` falling frequencies, then their cosines (Vaswani et al. 2017, section 3.5)."""
    frequency = base ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = places.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos_2d(width: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """A fixed table [1, prefix + h*w, width] for a grid in row order: the first half of the width tells the column, the second the row
    (He et al. 2022, MAE, released code); `prefix` rows of zeros in front. UserError where the width is no multiple of four."""
    if width % 4:
        raise UserError(f"a width of {width} does not split into sines and cosines of two axes", "choose a multiple of four")
    row, column = (v.flatten() for v in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"))
    table = torch.cat([sincos(width // 2, column), sincos(width // 2, row)], 1).float()
    return torch.cat([table.new_zeros(prefix, width), table])[None]


def sincos_pairs(width: int, length: int) -> Tensor:
    """[length, width]: column 2i is sin, 2i + 1 cos of place / 10000^(2i/width) (Vaswani et al. 2017, section 3.5), as VideoMAE lays them out."""
    table = sincos(width, torch.arange(length)).float()
    return torch.stack(table.chunk(2, 1), 2).flatten(1)


class SeparablePositions(Part):
    """Learned positions of a grid (t, h, w): one for each place, repeated over time, plus one for each time, repeated over space (Feichtenhofer et
    al. 2022, MAE-ST, section 3); `first` [1,prefix,D] is that of the tokens in front."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        grid: tuple[int, int, int]
        prefix: int = 1
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        shapes = (c.prefix, c.grid[1] * c.grid[2], c.grid[0])
        self.first, self.space, self.time = (nn.Parameter(nn.init.trunc_normal_(torch.empty(1, n, c.width), std=c.std, a=-2 * c.std, b=2 * c.std))
                                             for n in shapes)

    def forward(self) -> Tensor:
        """[1, t h w, D], time first."""
        return (self.time[:, :, None] + self.space[:, None]).flatten(1, 2)
