"""Rotary position embedding (Su et al. 2021, RoFormer)."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


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

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B,N,T,H]; position [T] or [B,T], counted in tokens (may be fractional) -> x turned, same shape and type."""
        half = self.turned // 2
        speed = self.base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = position.to(torch.float32)[..., None] * speed
        angle = angle if position.ndim == 1 else angle[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b, rest = x[..., :half], x[..., half:self.turned], x[..., self.turned:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
