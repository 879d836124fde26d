"""A head whose outputs are cosines with learned directions."""
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build


class Prototypes(Part):
    """MLP, unit length, then cosines with `out` prototypes (Caron et al. 2021, DINO, appendix C): [B,into] -> [B,out].

    `depth` linears with GELU between them, and no norms (`norm` puts one before each GELU, which convolutional towers of few steps need).
    The last layer has no bias and weight normalisation with its gain fixed at one, so its rows have unit length whatever an optimiser does
    to `last`. `gate` (a buffer, 1 at birth) multiplies the gradient of `last`: 0 holds it still.
    Names: `layers.{i}`, `norms.{i}`, `last`.
    """

    gate: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int = 65_536
        hidden: int = 2048
        bottleneck: int = 256
        depth: int = 3
        norm: Spec | None = None             # a BatchNorm1d.Config

    def __init__(self, c: Config):
        super().__init__()
        widths = (c.into, *(c.hidden,) * (c.depth - 1), c.bottleneck)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.norms = nn.ModuleList([nn.Identity() if c.norm is None else build(c.norm, width=c.hidden) for _ in self.layers[1:]])
        self.last = nn.Parameter(F.normalize(torch.randn(c.out, c.bottleneck), dim=1))
        self.register_buffer("gate", torch.ones(()))

    def rows(self) -> Tensor:
        """The prototypes [out,bottleneck], unit length."""
        weight = F.normalize(self.last.float(), dim=1)
        return self.gate * weight + (1 - self.gate) * weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = F.gelu(norm(layer(x)))
        x = F.normalize(self.layers[-1](x).float(), dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return F.linear(x, self.rows())
