"""Every tower, of any modality, returns the same thing."""
from typing import NamedTuple

from torch import Tensor

from polysense.base.system import Part


class Encoded(NamedTuple):
    """tokens [B,T,D], pooled [B,D], and mask [B,T] (True: a real token; None: all are)."""
    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None = None


class Tower(Part):
    """The base of the towers: forward returns an Encoded."""

    def pooled(self, given: Tensor, /) -> Tensor:
        """`self(given).pooled` [B,D]. Towers that read one token skip what only the other tokens of the last block would need."""
        return self(given).pooled
