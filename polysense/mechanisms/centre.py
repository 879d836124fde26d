"""The running mean that keeps a self-distilled output from collapsing onto one dimension."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class Centre(Part):
    """c <- m c + (1 - m) mean(g) (Caron et al. 2021, equation 4). `value [width]` is a buffer, zero at birth.

    The caller hands over the outputs of all ranks (`objectives.spread.gather`, then `Losses.keeping`), so the centre is one on all of them.
    """

    value: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner
        momentum: float = 0.9

    def __init__(self, c: Config):
        super().__init__()
        if c.width < 1 or not 0 <= c.momentum <= 1:
            raise UserError(f"a centre of width {c.width} and momentum {c.momentum}", "the width is at least one, the momentum between 0 and 1")
        self.momentum = c.momentum
        self.register_buffer("value", torch.zeros(c.width))

    @torch.no_grad()
    def move(self, output: Tensor) -> None:
        """output [...,width], the teacher's outputs for the whole batch, or their mean [width]."""
        self.value.lerp_(output.float().reshape(-1, len(self.value)).mean(0), 1 - self.momentum)

    def forward(self, output: Tensor) -> Tensor:
        """output [...,width] -> output - c."""
        return output - self.value
