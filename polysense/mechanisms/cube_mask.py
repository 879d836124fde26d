"""Blocks of space and time. Shapes: B batch, T times, h w places of a grid of cells."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.mechanisms.mask_sampler import Masking, checked, masking_of, rectangles


class CubeMask(Part):
    """Boxes until `ratio` of the cells are covered: a random rectangle of a fifth to all of a frame, for a random run of times (Wei et al. 2022,
    MaskFeat, section 4.3 and released code).

    A cell is `side` x `side` patches of the tower at one time. A box is taken if it hides at least one more cell and no more than are still to be
    hidden; after `tries` failures in a row a sample stops, with fewer hidden cells than asked for (`Masking.visible` is then -1).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        ratio: float = 0.4
        side: int = 2
        aspect: float = 0.3
        tries: int = 100

    def __init__(self, c: Config):
        super().__init__()
        if c.side < 1 or c.tries < 1 or not 0 < c.aspect <= 1:
            raise UserError(f"side={c.side}, aspect={c.aspect}, tries={c.tries} make no cubes", "counts are at least one, aspect is in (0, 1]")
        checked(c.ratio)
        self.c = c

    def forward(self, batch: int, grid: Sequence[int], device: torch.device | str | None = None) -> Masking:
        """grid (t, h, w) of patches -> Masking over t h w, time first. UserError for a grid that cells do not divide."""
        c, (times, height, width) = self.c, grid
        if height % c.side or width % c.side:
            raise UserError(f"a grid of {height}x{width} patches does not divide into cells of {c.side}x{c.side}", "choose other sizes")
        h, w = height // c.side, width // c.side
        asked, least = round(c.ratio * times * h * w), max(1, h * w // 5)
        mask = torch.zeros(batch, times, h, w, dtype=torch.bool, device=device)
        most, at = torch.full((batch,), h * w, device=device), torch.arange(times, device=device)
        failures = torch.zeros(batch, dtype=torch.int64, device=device)
        going = torch.full((batch,), asked > 0, device=device)
        while bool(going.any()):
            inside, fits = rectangles(least, most, c.aspect, h, w)
            length, front = torch.rand(2, batch, 1, device=device)
            length = 1 + (length * times).long()
            front = (front * (times - length + 1)).long()
            box = ((at >= front) & (at < front + length))[:, :, None, None] & inside[:, None]
            more = (box & ~mask).flatten(1).sum(1)
            good = going & fits & (more > 0) & (more <= asked - mask.flatten(1).sum(1))
            mask |= box & good[:, None, None, None]
            failures = torch.where(good, 0, failures + 1)
            going = going & (failures < c.tries) & (mask.flatten(1).sum(1) < asked)
        return masking_of(mask.repeat_interleave(c.side, 2).repeat_interleave(c.side, 3).flatten(1))
