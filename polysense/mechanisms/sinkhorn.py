"""The other way to keep a teacher's answers apart: not a running mean that is taken off, but the batch itself shared out evenly."""
from dataclasses import dataclass

from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class Sinkhorn(Part):
    """Stands in the slot of a `Centre`: says that answers are made by `objectives.clusters.sinkhorn` with so many iterations. Remembers nothing."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        iterations: int = 3

    def __init__(self, c: Config):
        super().__init__()
        if c.iterations < 1:
            raise UserError(f"iterations={c.iterations} of Sinkhorn-Knopp", "one at least")
        self.iterations = c.iterations

    def move(self, output: Tensor) -> None:
        """Nothing moves."""
