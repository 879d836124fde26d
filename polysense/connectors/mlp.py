"""A two-layer perceptron between what a tower sees and what a language model reads."""
from dataclasses import dataclass

from torch import Tensor

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.mlp import MLP


class MLPConnector(Part):
    """down(gelu(up(x))): [B,P,into] -> [B,P,out], both linears of width out (LLaVA-1.5, Liu et al. 2024, section 3.3). Name: `mlp`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        act: str = "gelu"

    def __init__(self, c: Config):
        super().__init__()
        self.mlp = MLP.Config(width=c.into, hidden=c.out, out=c.out, act=c.act).build()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)
