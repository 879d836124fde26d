"""Clicks, boxes and rough masks into tokens. Shapes: O objects, K points, C width, h w grid of the image encoding."""
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.norm import LayerNorm2d

PADDING, OUTSIDE, INSIDE, FIRST, SECOND = range(-1, 4)      # what a place is: not a point, outside, inside, the two corners of a box


def places(points: Tensor | None, point_label: Tensor | None, boxes: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """points [O,K,2] with point_label [O,K], boxes [O,4] -> places [O,T,2] and what each is [O,T]; None where nothing is given.

    A box is its two corners. Points without a box are followed by one place that is "not a point", as the released weights were trained.
    """
    place, kind = [], []
    if points is not None and point_label is not None:
        place.append(points)
        kind.append(point_label.long())
        if boxes is None:
            place.append(points.new_zeros(len(points), 1, 2))
            kind.append(kind[0].new_full((len(points), 1), PADDING))
    if boxes is not None:
        place.append(boxes.unflatten(-1, (2, 2)))
        kind.append(torch.tensor([FIRST, SECOND], device=boxes.device).expand(len(boxes), 2))
    return (torch.cat(place, 1), torch.cat(kind, 1)) if place else None


class MaskConv(Part):
    """Logits of a mask at four times the grid -> a map of the grid: two convolutions of stride 2, one of 1x1."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        middle: int

    def __init__(self, c: Config):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, c.middle // 4, 2, 2), nn.Conv2d(c.middle // 4, c.middle, 2, 2)
        self.norm1, self.norm2 = (LayerNorm2d(LayerNorm2d.Config(width=w)) for w in (c.middle // 4, c.middle))
        self.conv3 = nn.Conv2d(c.middle, c.width, 1)
        nn.init.zeros_(self.conv3.weight)                # at birth an answer fed back says nothing, so that what one click teaches holds for more

    def forward(self, mask: Tensor) -> Tensor:
        """[O,1,4h,4w] -> [O,C,h,w]."""
        gelu = nn.functional.gelu
        return self.conv3(gelu(self.norm2(self.conv2(gelu(self.norm1(self.conv1(mask)))))))


class PromptEncoder(Part):
    """Kirillov et al. 2023, section 3 and appendix A: a place is sin and cos of random frequencies (Tancik et al. 2020), the same for the
    grid of the picture, plus a learned vector for what it is; a mask is added to the image encoding.

    Coordinates are fractions of the picture's sides; as in the released code half a pixel is added, so they name the upper left corner of a
    pixel and mean its centre. The frequencies are a buffer: training leaves them alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 256
        image_size: int = 1024               # pixels along a side: half a pixel is 0.5 / image_size
        mask_width: int = 16
        words: int = 0                       # width of text or image features that may be prompts too; 0: none

    frequencies: Tensor

    def __init__(self, c: Config):
        super().__init__()
        if c.width % 2 or c.mask_width % 4:
            raise UserError(f"width={c.width} is no multiple of 2 or mask_width={c.mask_width} none of 4", "choose multiples")
        self.register_buffer("frequencies", torch.randn(2, c.width // 2))
        self.kinds = nn.Parameter(torch.randn(5, c.width))               # not a point, outside, inside, first corner, second corner
        self.no_mask = nn.Parameter(torch.randn(c.width))
        self.mask = MaskConv(MaskConv.Config(width=c.width, middle=c.mask_width))
        self.words = nn.Linear(c.words, c.width) if c.words else None
        self.width, self.offset = c.width, 0.5 / c.image_size
        self._grid: tuple[Any, Tensor] | None = None         # what the last code of a grid was made of, and the code

    def fourier(self, place: Tensor) -> Tensor:
        """place [...,2], x y in [0,1] -> [...,C]: sin, then cos, of 2 pi (2 place - 1) G."""
        angle = 2 * pi * ((2 * place.float() - 1) @ self.frequencies)
        return torch.cat([angle.sin(), angle.cos()], -1)

    def grid(self, h: int, w: int) -> Tensor:
        """[h*w,C]: the code of the middle of every place, computed once for all prompts of pictures of one size."""
        by = self.frequencies
        made_of = h, w, by.data_ptr(), by.device, torch.is_autocast_enabled(by.device.type), None if by.is_inference() else by._version
        if self._grid is None or self._grid[0] != made_of:
            with torch.inference_mode(False), torch.no_grad():               # a later training step may read it too
                y, x = ((torch.arange(n, device=by.device) + 0.5) / n for n in (h, w))
                code = self.fourier(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1)).flatten(0, 1)
            self._grid = made_of, code
        return self._grid[1]

    def tokens(self, place: Tensor, kind: Tensor) -> Tensor:
        """place [O,T,2] and what each is [O,T] (see `places`) -> [O,T,C]."""
        return self.fourier(place + self.offset) * (kind != PADDING)[..., None] + self.kinds[kind + 1]

    def read(self, words: Tensor) -> Tensor:
        """Features of a text, or of a picture in the same space, [O,D] -> one token [O,1,C]. Raises UserError where `words` is 0."""
        if self.words is None:
            raise UserError("this system was not taught to read words as prompts", "give points or boxes, or train its preset `words`")
        return self.words(words)[:, None]

    def dense(self, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        """seen [O,C,h,w] with a rough mask [O,4h,4w] (logits), or the learned "no mask", added."""
        if mask is None:
            return seen + self.no_mask[:, None, None]
        want = (4 * seen.shape[-2], 4 * seen.shape[-1])
        if mask.shape[-2:] != want:
            raise UserError(f"a mask prompt of {mask.shape[-2]}x{mask.shape[-1]}", f"this system reads logits of {want[0]}x{want[1]}")
        return seen + self.mask(mask[:, None].to(seen.dtype))
