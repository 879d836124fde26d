"""Embedding of a diffusion time. Shapes: B batch, D width."""
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part

PERIOD = 10_000.0


def sinusoid(t: Tensor, width: int, shift: float = 0.0, order: str = "cos sin") -> Tensor:
    """t [B], whole or fractional -> [B,width]: sines and cosines of t at frequencies PERIOD^(-i / (width/2 - shift)) (Vaswani et al. 2017, 3.5)."""
    half = width // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-log(PERIOD) / (half - shift)))
    angle = t.float()[:, None] * rate
    waves = {"sin": angle.sin(), "cos": angle.cos()}
    return F.pad(torch.cat([waves[name] for name in order.split()], -1), (0, width % 2))


class SinusoidalTime(Part):
    """down(silu(up(sinusoid(t)))): what every residual block of a U-Net is told about t (Ho et al. 2020, appendix B)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # of the sinusoid; 0: set by the owner, as out
        out: int = 0
        shift: float = 0.0                   # 1: the frequencies end exactly at 1 / PERIOD (Ho et al.); 0: just above (latent diffusion)
        order: str = "cos sin"               # or "sin cos"

    def __init__(self, c: Config):
        super().__init__()
        self.width, self.shift, self.order = c.width, c.shift, c.order
        self.up, self.down = nn.Linear(c.width, c.out), nn.Linear(c.out, c.out)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B,out]."""
        return self.down(F.silu(self.up(sinusoid(t, self.width, self.shift, self.order).to(self.up.weight.dtype))))
