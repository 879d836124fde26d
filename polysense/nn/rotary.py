"""Rotary position embedding (Su et al. 2021, RoFormer)."""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class Turn(NamedTuple):
    """Cosines and sines of angles, [T,turned/2] or [B,1,T,turned/2]."""
    cos: Tensor
    sin: Tensor


class Rotary(Part):
    """Turns pairs of features by an angle that grows with the position, so q.k depends on the distance only (equation 34).

    Pairs are the two halves of a head (GPT-NeoX, Llama in transformers), not neighbours (the original, Llama's own files): key maps permute.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # of a head; 0: set by the owner
        base: float = 10000.0
        share: float = 1.0                   # of the features that turn; the rest pass unchanged

    def __init__(self, c: Config):
        super().__init__()
        self.turned, self.base = int(c.share * c.width), c.base
        if self.turned % 2:
            raise UserError(f"rotary embedding turns pairs, but {self.turned} features of a head would turn", "choose an even number")

    def turn(self, position: Tensor) -> Turn:
        """position [T] or [B,T] -> its angles, in float32: computed once where many layers turn by the same."""
        half = self.turned // 2
        speed = self.base ** (-torch.arange(half, device=position.device, dtype=torch.float32) / half)
        angle = position.to(torch.float32)[..., None] * speed
        angle = angle if position.ndim == 1 else angle[:, None]
        return Turn(angle.cos(), angle.sin())

    def forward(self, x: Tensor, position: Tensor | Turn) -> Tensor:
        """x [B,N,T,H]; position [T] or [B,T], counted in tokens (may be fractional), or its `turn` -> x turned, same shape and type."""
        half, by = self.turned // 2, position if isinstance(position, Turn) else self.turn(position)
        cos, sin = by.cos.to(x.dtype), by.sin.to(x.dtype)
        if 2 * half == x.shape[-1]:              # the same in three passes over x, not eight
            return torch.addcmul(x * torch.cat([cos, cos], -1), x.roll(half, -1), torch.cat([-sin, sin], -1))
        a, b, rest = x[..., :half], x[..., half:self.turned], x[..., self.turned:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class GridRotary(Rotary):
    """The same for patches of a picture: of the pairs of a head, half turn by the row and half by the column (Fang et al. 2023, EVA-02).

    A place [.., T, 2] is (row, column) in units of the grid of pre-training, `grid` to a side: a finer grid turns by fractions. What stands at (0, 0)
    is not turned, and so a class token is put there.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Rotary.Config):
        grid: int = 16

    def __init__(self, c: Config):
        super().__init__(c)
        if self.turned % 4:
            raise UserError(f"{self.turned} features of a head do not split into pairs for rows and columns", "choose a multiple of four")
        self.grid = c.grid

    def places(self, grid: tuple[int, int], prefix: int, keep: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Where the tokens of a picture stand: `prefix` at (0, 0), then the patches of a grid (h, w) in row order -> [T,2]; those that are kept
        (keep [B,K]) -> [B,prefix + K,2]."""
        axes = (torch.arange(n, device=device, dtype=torch.float32) * (self.grid / n) for n in grid)
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        place = place if keep is None else place[keep]
        return torch.cat([place.new_zeros(*place.shape[:-2], prefix, 2), place], -2)

    def turn(self, position: Tensor) -> Turn:
        """position [T,2] or [B,T,2] -> its angles."""
        if position.ndim < 2 or position.shape[-1] != 2:
            raise UserError(f"positions of shape {list(position.shape)} are no places of a grid", "give (row, column): [T,2] or [B,T,2]")
        quarter = self.turned // 4
        speed = self.base ** (-torch.arange(quarter, device=position.device, dtype=torch.float32) / quarter)
        angle = (position.to(torch.float32)[..., None] * speed).flatten(-2)
        angle = angle if position.ndim == 2 else angle[:, None]
        return Turn(angle.cos(), angle.sin())
