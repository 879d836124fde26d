"""Tubes that do not last the whole clip. Shapes: B batch, T times, h w places."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.mechanisms.mask_sampler import BlockMask, Masking, masking_of


class SpanMask(Part):
    """One blockwise mask, held over a random run of between `shortest` and all of the times, which goes on at the start where it passes the end
    (Wang et al. 2022, BEVT, section 3.3). At other times nothing is hidden."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        frame: BlockMask.Config
        shortest: float = 0.5                # share of the times

    def __init__(self, c: Config):
        super().__init__()
        if not 0 < c.shortest <= 1:
            raise UserError(f"shortest={c.shortest}", "it is a share, above 0 and up to 1")
        self.frame, self.shortest = c.frame.build(), c.shortest

    def forward(self, batch: int, grid: Sequence[int], device: torch.device | str | None = None) -> Masking:
        """grid (t, h, w) -> Masking over t h w places, time first."""
        t, h, w = grid
        frame: Tensor = self.frame(batch, (h, w), device).mask
        least = -int(-self.shortest * t // 1)
        length = torch.randint(least, t + 1, (batch, 1), device=device)
        start = torch.randint(t, (batch, 1), device=device)
        on = (torch.arange(t, device=device) - start) % t < length
        return masking_of((on[:, :, None] & frame[:, None]).flatten(1))
