"""Codes of pictures and of clips out of one trunk's last two maps. Shapes: B batch, T times, h w places of the map before the last, D width of the
last map, K codes."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part


class _Rise(nn.Module):
    """The map before the last beside the last one, twice as large by a transposed convolution, through a linear down to the last one's width."""

    def __init__(self, into: int):
        super().__init__()
        self.grow, self.down = nn.ConvTranspose2d(into, into, 2, 2), nn.Linear(into // 2 + into, into)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """before [B,T,h,w,D/2], last [B,T,h/2,w/2,D] -> [B,T,h,w,D]."""
        grown = self.grow(last.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, last.shape[:2])
        return self.down(torch.cat([before, grown], -1))


class TwoStreams(Part):
    """`still` and `moving` rise to the places of the codes, each with weights of its own, clips also to all their frames (`times`, a transposed
    convolution over time). Behind one norm, the trunk's, which the owner applies, one shared linear `classify` (Wang et al. 2022, BEVT, section 3.2
    and released code)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # D; 0: set by the owner, as out and stretch
        out: int = 0                         # K
        stretch: int = 0                     # frames of a time

    def __init__(self, c: Config):
        super().__init__()
        self.still, self.moving = _Rise(c.into), _Rise(c.into)
        self.times = nn.ConvTranspose1d(c.into, c.into, c.stretch, c.stretch)
        self.classify = nn.Linear(c.into, c.out)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def of_picture(self, before: Tensor, last: Tensor) -> Tensor:
        """The maps of a picture -> features [B,h,w,D], not normed."""
        return self.still(before, last)[:, 0]

    def of_clip(self, before: Tensor, last: Tensor) -> Tensor:
        """The maps of a clip -> features [B,F,h,w,D] of every frame, not normed."""
        x = self.moving(before, last)
        b, _, h, w, _ = x.shape
        return self.times(x.permute(0, 2, 3, 4, 1).flatten(0, 2)).unflatten(0, (b, h, w)).permute(0, 4, 1, 2, 3)
