"""Residual encoder and decoder between pictures and small maps, as VQ-GAN and latent diffusion have them. Shapes: B batch, H W pixels, h w places."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.norm import GroupNorm
from polysense.nn.spatial import Grow, ResBlock, Shrink, SpatialAttention, silu


@dataclass(frozen=True, kw_only=True)
class Ladder(Spec):
    """What encoder and decoder are made of."""
    widths: tuple[int, ...]                  # of the levels, largest map first; each is half the size of the one before
    depth: int = 2                           # residual blocks a level in the encoder, one more in the decoder
    maps: int                                # channels of the small map
    attend: tuple[int, ...] = ()             # levels with attention behind each block, counted from the largest map; the middle always has it
    code: int = 0                            # width of a code, to and from which a 1x1 convolution leads (`quant`); 0: there is none
    channels: int = 3
    norm: Spec = field(default_factory=lambda: GroupNorm.Config(eps=1e-6))

    @property
    def stride(self) -> int:
        """Pixels along a side of one place."""
        return 2 ** (len(self.widths) - 1)


class _Ends(Part):
    """What both share: the middle at the smallest size and the last convolution."""

    def __init__(self, c: Ladder, last: int, out: int):
        super().__init__()
        if absent := [i for i in c.attend if not 0 <= i < len(c.widths)]:
            raise UserError(f"attention at the level {absent[0]}", f"the levels are 0 to {len(c.widths) - 1}")
        width, block = c.widths[-1], ResBlock.Config(into=c.widths[-1], width=c.widths[-1], norm=c.norm)
        self.mid: Any = nn.ModuleDict({"block1": block.build(), "attn": SpatialAttention.Config(width=width, norm=c.norm).build(),
                                       "block2": block.build()})
        self.norm_out, self.conv_out = build(c.norm, width=last), nn.Conv2d(last, out, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.mid["block2"](self.mid["attn"](self.mid["block1"](x)))

    def end(self, x: Tensor) -> Tensor:
        return self.conv_out(silu(self.norm_out(x)))


class _Level(nn.Module):
    """Residual blocks, each with attention behind it where the level has some."""

    def __init__(self, c: Ladder, level: int, intos: list[int], turn: Mapping[str, nn.Module]):
        super().__init__()
        width = c.widths[level]
        self.blocks = nn.ModuleList(ResBlock(ResBlock.Config(into=i, width=width, norm=c.norm)) for i in intos)
        self.attn = nn.ModuleList(SpatialAttention.Config(width=width, norm=c.norm).build() for _ in intos if level in c.attend)
        for name, part in turn.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x


class ResEncoder(_Ends):
    """Convolution, levels that halve the map, middle, norm, convolution (Esser et al. 2021, table 7; Rombach et al. 2022, appendix G).

    Names: `conv_in down.{l}.blocks.{i} down.{l}.attn.{i} down.{l}.shrink mid norm_out conv_out quant`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Ladder):
        pass

    def __init__(self, c: Ladder):
        super().__init__(c, c.widths[-1], c.maps)
        self.conv_in, self.down = nn.Conv2d(c.channels, c.widths[0], 3, padding=1), nn.ModuleList()
        into = c.widths[0]
        for i, width in enumerate(c.widths):
            turn = {"shrink": Shrink(Shrink.Config(width=width, pad="end"))} if i < len(c.widths) - 1 else {}
            self.down.append(_Level(c, i, [into] + [width] * (c.depth - 1), turn))
            into = width
        self.quant = nn.Conv2d(c.maps, c.code, 1) if c.code else None
        self.stride, self.channels = c.stride, c.channels
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] -> [B, code or maps, h, w]."""
        x = self.conv_in(image.contiguous(memory_format=torch.channels_last))
        for level in self.down:
            x = level(x)
            x = level.shrink(x) if hasattr(level, "shrink") else x  # type: ignore[operator]
        x = self.end(self.middle(x))
        return x if self.quant is None else self.quant(x)


class ResDecoder(_Ends):
    """Convolution, middle, levels that double the map, norm, convolution: the mirror.

    Names: `quant conv_in mid up.{l}.blocks.{i} up.{l}.attn.{i} up.{l}.grow norm_out conv_out`; level 0 of `up` is the smallest map.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Ladder):
        pass

    def __init__(self, c: Ladder):
        super().__init__(c, c.widths[0], c.channels)
        self.conv_in, self.up = nn.Conv2d(c.maps, c.widths[-1], 3, padding=1), nn.ModuleList()
        into = c.widths[-1]
        for i, width in reversed(list(enumerate(c.widths))):
            turn = {"grow": Grow(Grow.Config(width=width))} if i else {}
            self.up.append(_Level(c, i, [into] + [width] * c.depth, turn))
            into = width
        self.quant = nn.Conv2d(c.code, c.maps, 1) if c.code else None
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def last(self) -> Tensor:
        """The weight of the last layer: where gradients of what the decoder is asked for are compared."""
        return self.conv_out.weight

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, code or maps, h, w] -> image [B,C,H,W]."""
        x = codes.contiguous(memory_format=torch.channels_last)
        x = self.middle(self.conv_in(x if self.quant is None else self.quant(x)))
        for level in self.up:
            x = level(x)
            x = level.grow(x) if hasattr(level, "grow") else x  # type: ignore[operator]
        return self.end(x)
