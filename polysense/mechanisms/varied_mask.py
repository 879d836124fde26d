"""Block masks over some of the pictures, each with as many hidden patches as its own draw says (iBOT, DINOv2)."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.mechanisms.mask_sampler import BlockMask, Device
from polysense.nn.masking import Masking

DRAWS = ("each", "even")


class VariedBlocks(Part):
    """A share of the pictures is masked, by a ratio between two ends, the others are not.

    draw "each": every picture is masked with that chance, by a ratio uniform between the ends (Zhou et al. 2022, iBOT, appendix D); "even": exactly
    that share of the batch, their ratios spread evenly over the range (Oquab et al. 2024, DINOv2, released code). The blocks are BEiT's; what no
    block can fill any more is drawn at random, so that every picture hides as many patches as it drew.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        share: float = 0.5
        ratio: tuple[float, float] = (0.1, 0.5)
        draw: str = "each"
        blocks: BlockMask.Config = field(default_factory=lambda: BlockMask.Config(fill="exact"))

    def __init__(self, c: Config):
        super().__init__()
        if c.draw not in DRAWS or not 0 <= c.share <= 1 or not 0 < c.ratio[0] <= c.ratio[1] < 1:
            raise UserError(f"share={c.share}, ratio={c.ratio}, draw={c.draw!r} make no mask",
                            f"the share lies in [0, 1], the ratios rise in (0, 1), draw is one of {', '.join(DRAWS)}")
        self.c, self.blocks = c, c.blocks.build()

    def forward(self, batch: int, grid: Sequence[int], device: Device = None) -> Masking:
        """batch samples of a grid (h, w) -> Masking; the samples hide different numbers of patches, and about half of them none."""
        (low, high), n = self.c.ratio, prod(grid)
        if self.c.draw == "each":
            ratio, masked = torch.rand(batch, device=device), torch.rand(batch, device=device) < self.c.share
        else:
            few, order = int(batch * self.c.share), torch.randperm(batch, device=device)
            place = torch.arange(batch, device=device)
            ratio = ((place + torch.rand(batch, device=device)) / max(1, few))[order]
            masked = (place < few)[order]
        count = ((low + (high - low) * ratio) * n).ceil().long().clamp(max=int(high * n))
        return self.blocks(batch, grid, device, hidden=torch.where(masked, count, 0))
