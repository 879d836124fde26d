"""Codes of pictures and of clips out of one trunk's last two maps. Shapes: B batch, T times, h w places of the map before the last, K codes."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.norm import LayerNorm


class _Rise(nn.Module):
    """The last map twice as large by a transposed convolution, beside the one before it, through a linear down to `width`."""

    def __init__(self, into: int, width: int):
        super().__init__()
        self.grow, self.down = nn.ConvTranspose2d(into, into // 2, 2, 2), nn.Linear(into, width)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """before [B,T,h,w,into/2], last [B,T,h/2,w/2,into] -> [B,T,h,w,width]."""
        grown = self.grow(last.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, last.shape[:2])
        return self.down(torch.cat([grown, before], -1))


class TwoStreams(Part):
    """`still` and `moving` rise to the places of the codes, each with weights of its own, clips also to all their frames (`times`, a transposed
    convolution over time); then one norm of each and one shared linear `classify` (Wang et al. 2022, BEVT, section 3.2)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # width of the last map; 0: set by the owner, as out and stretch
        width: int = 256
        out: int = 0                         # K
        stretch: int = 0                     # frames of a time

    def __init__(self, c: Config):
        super().__init__()
        self.still, self.moving = _Rise(c.into, c.width), _Rise(c.into, c.width)
        self.times = nn.ConvTranspose1d(c.width, c.width, c.stretch, c.stretch)
        self.still_norm, self.moving_norm = (LayerNorm(LayerNorm.Config(width=c.width)) for _ in range(2))
        self.classify = nn.Linear(c.width, c.out)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def of_picture(self, before: Tensor, last: Tensor) -> Tensor:
        """The maps of a picture -> logits [B,h,w,K]."""
        return self.classify(self.still_norm(self.still(before, last)[:, 0]))

    def of_clip(self, before: Tensor, last: Tensor) -> Tensor:
        """The maps of a clip -> logits [B,F,h,w,K] of every frame."""
        x = self.moving(before, last)
        b, _, h, w, _ = x.shape
        x = self.times(x.permute(0, 2, 3, 4, 1).flatten(0, 2)).unflatten(0, (b, h, w)).permute(0, 4, 1, 2, 3)
        return self.classify(self.moving_norm(x))
