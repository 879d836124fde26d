"""The position-wise half of a transformer block."""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.activation import activation
from polysense.nn.attention import lowered


class MLP(Part):
    """down(act(up(x))): [..., width] -> [..., out]. Vaswani et al. 2017, equation 2."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner
        hidden: int = 0                      # 0: ratio * width
        ratio: float = 4.0
        out: int = 0                         # 0: width
        act: str = "gelu"                    # gelu, gelu_tanh, quick_gelu, relu, silu, tanh
        bias: str = "up down"                # the linears that have one
        dropout: float = 0.0                 # after the activation

    def __init__(self, c: Config):
        super().__init__()
        hidden = c.hidden or int(c.ratio * c.width)
        self.up = nn.Linear(c.width, hidden, bias="up" in c.bias.split())
        self.down = nn.Linear(hidden, c.out or c.width, bias="down" in c.bias.split())
        self.act, self.dropout = activation(c.act), c.dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return self.down(h)


class GatedMLP(Part):
    """down(act(gate(x)) * up(x)): SwiGLU with act="silu" (Shazeer 2020, equation 6). [..., width] -> [..., out]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        hidden: int = 0                      # 0: ratio * width
        ratio: float = 8 / 3                 # equal parameters to an MLP of ratio 4
        out: int = 0
        act: str = "silu"
        bias: str = ""                       # of "gate up down"
        dropout: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        hidden, biased = c.hidden or int(c.ratio * c.width), c.bias.split()
        self.gate = nn.Linear(c.width, hidden, bias="gate" in biased)
        self.up = nn.Linear(c.width, hidden, bias="up" in biased)
        self.down = nn.Linear(hidden, c.out or c.width, bias="down" in biased)
        self.act, self.dropout = activation(c.act), c.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = lowered(x)
        h = self.act(self.gate(x)) * self.up(x)
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        return self.down(h)
