"""The denoising U-Net. Shapes: B batch, C channels, H W places, S tokens of the context, D their width."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.spatial import Grow, ResBlock, Shrink, SpatialAttention, silu, zeroed
from polysense.nn.time import SinusoidalTime


@dataclass(frozen=True, kw_only=True)
class Level(Spec):
    """One resolution: `depth` residual blocks down (one more up), each followed by `attn` where there is one."""
    width: int
    depth: int = 2
    attn: Spec | None = None                 # SpatialAttention or SpatialTransformer; its width is set here


class _Level(nn.Module):
    """Modules of one resolution: `blocks`, `attn` (empty, or one a block), and what leads to the next one."""

    def __init__(self, c: "UNetHalf.Config", intos: Sequence[int], level: Level, after: dict[str, Part]):
        super().__init__()
        wide = c.time_width
        self.blocks: Any = nn.ModuleList(build(c.block, into=i, width=level.width, time_width=wide) for i in intos)
        self.attn: Any = nn.ModuleList(build(level.attn, width=level.width) for _ in intos if level.attn is not None)
        for name, part in after.items():
            self.add_module(name, part)

    def each(self, i: int, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        x = self.blocks[i](x, time)
        return self.attn[i](x, context) if len(self.attn) else x


class _Middle(nn.Module):
    def __init__(self, c: "UNetHalf.Config"):
        super().__init__()
        width = c.levels[-1].width
        self.block1, self.block2 = (build(c.block, into=width, width=width, time_width=c.time_width) for _ in range(2))
        self.attn = build(c.mid, width=width) if c.mid is not None else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        x = self.block1(x, time)
        return self.block2(x if self.attn is None else self.attn(x, context), time)


class UNetHalf(Part):
    """The way down and the middle, without the way up: what ControlNet copies. Names: `conv_in time down.{l}.blocks.{i} down.{l}.attn.{i}
    down.{l}.shrink mid.block1 mid.attn mid.block2`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        levels: tuple[Level, ...]
        channels: int = 3                    # of the input
        out: int = 0                         # of the output; 0: channels
        mid: Spec | None = field(default_factory=SpatialAttention.Config)     # attention of the middle
        block: Spec = field(default_factory=ResBlock.Config)
        time: Spec = field(default_factory=SinusoidalTime.Config)
        pad: str = "both"                    # of Shrink

        @property
        def time_width(self) -> int:
            """Width of the time embedding: four times the first level's."""
            return 4 * self.levels[0].width

        @property
        def skips(self) -> tuple[int, ...]:
            """Widths of the skip connections, first to last."""
            out = [self.levels[0].width]
            for i, level in enumerate(self.levels):
                out += [level.width] * (level.depth + (i < len(self.levels) - 1))
            return tuple(out)

    def __init__(self, c: Config):
        super().__init__()
        first = c.levels[0].width
        self.time = build(c.time, width=first, out=c.time_width)
        self.conv_in = nn.Conv2d(c.channels, first, 3, padding=1)
        self.down: Any = nn.ModuleList()
        width = first
        for i, level in enumerate(c.levels):
            shrink: dict[str, Part] = {"shrink": Shrink(Shrink.Config(width=level.width, pad=c.pad))} if i < len(c.levels) - 1 else {}
            self.down.append(_Level(c, [width] + [level.width] * (level.depth - 1), level, shrink))
            width = level.width
        self.mid: Any = _Middle(c)
        self.channels, self.factor = c.channels, 2 ** (len(c.levels) - 1)

    def told(self, x: Tensor, t: Tensor, extra: Tensor | None = None) -> Tensor:
        """t, a number or [B] -> the activated time embedding [B,E] of the batch x, `extra` [B,E] added before the activation."""
        e = self.time(t.expand(len(x)) if t.ndim == 0 else t)
        return F.silu(e if extra is None else e + extra)

    def encode(self, x: Tensor, time: Tensor, context: Tensor | None = None, *, hint: Tensor | None = None) -> list[Tensor]:
        """x [B,C,H,W], time from `told`, context [B,S,D] -> the skip connections, first to last, and behind them the middle.

        hint, of the shape of the first map, is added to it (ControlNet). Raises UserError for a wrong shape.
        """
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise UserError(f"a map of shape {list(x.shape)}",
                            f"this U-Net reads [B,{self.channels},H,W] with H and W multiples of {self.factor}")
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        out = [x if hint is None else x + hint]
        for level in self.down:
            for i in range(len(level.blocks)):
                out.append(level.each(i, out[-1], time, context))
            if hasattr(level, "shrink"):
                out.append(level.shrink(out[-1]))
        return [*out, self.mid(out[-1], time, context)]


class UNet(UNetHalf):
    """eps(x, t, context) -> [B,out,H,W]. Residual blocks that know the time, attention where a level has it, skips joined by concatenation.

    Ho et al. 2020, appendix B, with `SpatialAttention`; Rombach et al. 2022 with `SpatialTransformer`. `conv_out` starts at zero, so a new
    network predicts exactly 0. Further names: `up.{l}.blocks.{i} up.{l}.attn.{i} up.{l}.grow` from the smallest map on, `norm_out conv_out`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(UNetHalf.Config):
        pass

    def __init__(self, c: Config):
        super().__init__(c)
        skips, width = list(c.skips), c.levels[-1].width
        self.up: Any = nn.ModuleList()
        for i, level in reversed(list(enumerate(c.levels))):
            intos = [(width if j == 0 else level.width) + skips.pop() for j in range(level.depth + 1)]
            grow: dict[str, Part] = {"grow": Grow(Grow.Config(width=level.width))} if i else {}
            self.up.append(_Level(c, intos, level, grow))
            width = level.width
        self.norm_out = build(c.block.norm, width=width)  # type: ignore[attr-defined]
        self.conv_out = zeroed(nn.Conv2d(width, c.out or c.channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, *, extra: Tensor | None = None,
                add: Sequence[Tensor] | None = None) -> Tensor:
        """x [B,C,H,W], t a number or [B], context [B,S,D] -> [B,out,H,W].

        extra [B, 4 * first width]: joins the time embedding. add: one residual for each skip connection, then one for the middle (ControlNet,
        adapters); what it adds is seen on the way up only.
        """
        time = self.told(x, t, extra)
        *skips, x = self.encode(x, time, context)
        if add is not None:
            if len(add) != len(skips) + 1:
                raise UserError(f"{len(add)} residuals were given", f"this U-Net takes {len(skips)} for its skips and one for the middle")
            skips, x = [s + a for s, a in zip(skips, add[:-1], strict=True)], x + add[-1]
        for level in self.up:
            for i in range(len(level.blocks)):
                x = level.each(i, torch.cat([x, skips.pop()], 1), time, context)
            if hasattr(level, "grow"):
                x = level.grow(x)
        return self.conv_out(silu(self.norm_out(x)))
