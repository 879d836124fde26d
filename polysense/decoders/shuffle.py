"""One linear layer from a map of features to pixels. Shapes: B batch, N patches, M hidden, D width, h w places of the map."""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.masking import Masking
from polysense.nn.patch import patchify


class ShuffleHead(Part):
    """A 1x1 convolution to stride^2 * 3 channels, then PixelShuffle: the place (i, j) of the encoder's last map becomes the pixels
    [i s, (i + 1) s) x [j s, (j + 1) s) (Xie et al. 2022, SimMIM, section 3.3; heavier heads transfer worse, its table 2).

    The stride of the map may be larger than a patch of the encoder (Swin halves it stage by stage), so hidden patches are cut out of the picture.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        stride: int                          # of the encoder's last map, in pixels
        patch: int                           # of the encoder: what is hidden is said in these
        into: int = 0                        # width of the encoder's tokens; 0: set by the owner
        prefix: int = 0                      # tokens before those of the map
        channels: int = 3

    def __init__(self, c: Config):
        super().__init__()
        if c.stride % c.patch:
            raise UserError(f"a stride of {c.stride} and patches of {c.patch} pixels", "patches divide the stride")
        self.conv, self.c = nn.Conv2d(c.into, c.stride ** 2 * c.channels, 1), c

    def draw(self, tokens: Tensor) -> Tensor:
        """tokens [B, prefix + h w, into] of a square map -> the whole picture [B,C,H,W]."""
        places = tokens[:, self.c.prefix:]
        side = round(places.shape[1] ** 0.5)
        if side * side != places.shape[1]:
            raise UserError(f"{places.shape[1]} places do not form a square map", "this head draws square pictures")
        drawn = F.linear(places, self.conv.weight.flatten(1), self.conv.bias)      # a 1x1 convolution; on processors faster as one product
        return F.pixel_shuffle(drawn.transpose(1, 2).unflatten(2, (side, side)), self.c.stride)

    def forward(self, tokens: Tensor, masking: Masking) -> Tensor:
        """-> [B,M,patch*patch*C], the pixels of the hidden patches in the order of `masking.hidden`."""
        return masking.at_hidden(patchify(self.draw(tokens), self.c.patch))
