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
        a, b, rest = x[..., :half], x[..., half:self.turned], x[..., self.turned:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
