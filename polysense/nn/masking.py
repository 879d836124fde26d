"""Which patches are hidden, as a value that samplers make and towers and decoders read. Shapes: B batch, N patches, K visible, M hidden, D width."""
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from polysense.base.errors import UserError


@dataclass(frozen=True)
class Masking:
    """What is hidden from whom.

    `mask [B,N]`: True is hidden. `order [B,N]`: the patches' numbers, visible ones first. `visible`: how many of them (K), the same for every
    sample; -1 where the samples differ, and then `keep`, `hidden` and `restore` do not exist, only `mask`.
    """
    mask: Tensor
    order: Tensor
    visible: int

    @property
    def keep(self) -> Tensor:
        """[B,K], the numbers of the visible patches, as `ViT.forward(keep=)` takes them."""
        return self.order[:, :self._even()]

    @property
    def hidden(self) -> Tensor:
        """[B,M], the numbers of the hidden patches."""
        return self.order[:, self._even():]

    @cached_property
    def restore(self) -> Tensor:
        """[B,N]: `cat([at keep, at hidden], 1).gather(1, restore)` is in the order of the grid again (MAE's ids_restore)."""
        self._even()
        return self.order.argsort(1)

    def at_hidden(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> [B,M,D], the rows of the hidden patches in the order of `hidden`."""
        return take(x, self.hidden)

    def at_visible(self, x: Tensor) -> Tensor:
        """x [B,N,D] -> [B,K,D], the rows of the visible patches in the order of `keep`."""
        return take(x, self.keep)

    def _even(self) -> int:
        if self.visible < 0:
            raise UserError("the samples of this batch have different numbers of hidden patches", "use `mask`, or a sampler that hides as many")
        return self.visible


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x [B,N,D], rows [B,K] -> [B,K,D]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def masking_of(mask: Tensor) -> Masking:
    """The Masking of a given mask [B,N], True is hidden; within the visible and within the hidden the order of the grid is kept."""
    counts = (~mask).sum(1)
    visible = int(counts[0]) if len(counts) and bool((counts == counts[0]).all()) else -1
    return Masking(mask, mask.int().argsort(dim=1, stable=True), visible)


def masking_by(noise: Tensor, visible: int) -> Masking:
    """Hides all but the `visible` patches of least noise [B,N] (He et al. 2022, MAE, section 3: shuffle, keep the head of the list)."""
    order = noise.argsort(1)
    mask = torch.ones_like(noise, dtype=torch.bool).scatter_(1, order[:, :visible], False)
    return Masking(mask, order, visible)
