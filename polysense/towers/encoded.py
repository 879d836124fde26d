"""Every tower, of any modality, returns the same thing."""
from typing import NamedTuple

from torch import Tensor


class Encoded(NamedTuple):
    """tokens [B,T,D], pooled [B,D], and mask [B,T] (True: a real token; None: all are)."""
    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None = None
