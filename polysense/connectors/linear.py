"""One matrix between what a tower sees and what a language model reads."""
from dataclasses import dataclass

from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part


class LinearConnector(Part):
    """x W^T + b: [B,P,into] -> [B,P,out] (LLaVA, Liu et al. 2023, equation 1). Name: `project`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int

    def __init__(self, c: Config):
        super().__init__()
        self.project = nn.Linear(c.into, c.out)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)
