"""A dictionary of keys that outlives the batch."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class Queue(Part):
    """First in, first out: the newest `size` unit keys (He et al. 2020, section 3.2). Random directions at birth.

    `keys [size, width]` and the place `pointer []` of the next write are buffers, so a resumed run goes on with the same negatives. A batch
    may straddle the end. On several ranks the caller pushes the keys of *all* ranks in one order (`objectives.spread.gather` in the
    objective, `Losses.keeping`, then `push` in `after_step`), so that all ranks hold one queue.
    """

    keys: Tensor
    pointer: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        size: int = 65_536
        width: int = 0                       # 0: set by the owner

    def __init__(self, c: Config):
        super().__init__()
        if c.size < 1 or c.width < 1:
            raise UserError(f"a queue of {c.size} keys of width {c.width}", "both are at least one")
        self.register_buffer("keys", F.normalize(torch.randn(c.size, c.width), dim=-1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """keys [N,width], N at most `size`, scaled to unit length, take the places of the N oldest. UserError for more than fit."""
        size = len(self.keys)
        if keys.ndim != 2 or keys.shape[1] != self.keys.shape[1] or len(keys) > size:
            raise UserError(f"keys of shape {list(keys.shape)} for a queue of {list(self.keys.shape)}", "choose a queue of at least the global batch")
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, places, F.normalize(keys.to(self.keys.dtype), dim=-1))
        self.pointer.copy_((self.pointer + len(keys)) % size)
