"""Blocks that work on maps: residual, attention, transformer, half and double size. Shapes: B batch, C width, H W places, S source tokens."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.init import FanInInit
from polysense.nn.mlp import GatedMLP
from polysense.nn.norm import GroupNorm
from polysense.nn.transformer import Transformer


def silu(x: Tensor) -> Tensor:
    """In place where no graph is kept: x is the output of a norm, used once."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer with weight and bias zero: it says nothing at birth."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def tokens(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,HW,C]; a view where the map is stored channels last."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Tensor, like: Tensor) -> Tensor:
    """[B,HW,C] -> [B,C,H,W] with the H and W of `like`."""
    return x.transpose(1, 2).unflatten(2, like.shape[2:])


class ResBlock(Part):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time))): [B,into,H,W] -> [B,width,H,W] (Ho et al. 2020, appendix B).

    `time` is absent where `time_width` is 0 (auto-encoders), `shortcut` where the width stays. conv2 starts at zero.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # 0: set by the owner, as width and time_width
        width: int = 0
        time_width: int = 0
        norm: Spec = field(default_factory=GroupNorm.Config)
        dropout: float = 0.0                 # before conv2

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.conv1 = build(c.norm, width=c.into), nn.Conv2d(c.into, c.width, 3, padding=1)
        self.time = nn.Linear(c.time_width, c.width) if c.time_width else None
        self.norm2, self.conv2 = build(c.norm, width=c.width), zeroed(nn.Conv2d(c.width, c.width, 3, padding=1))
        self.shortcut = nn.Conv2d(c.into, c.width, 1) if c.into != c.width else None
        self.dropout = c.dropout

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B,into,H,W]; time [B,time_width], the embedding after its activation."""
        h = self.conv1(silu(self.norm1(x)))
        if self.time is not None and time is not None:
            h = h + self.time(time)[:, :, None, None]
        h = silu(self.norm2(h))
        h = self.conv2(F.dropout(h, self.dropout, self.training) if self.dropout else h)
        return h + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(Part):
    """x + attention over places of norm(x): [B,C,H,W] -> [B,C,H,W] (Ho et al. 2020; Rombach et al. 2022). The last linear starts at zero."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        heads: int = 1
        norm: Spec = field(default_factory=GroupNorm.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.norm = build(c.norm, width=c.width)
        self.attn = Attention(Attention.Config(width=c.width, heads=c.heads))
        zeroed(self.attn.out)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B,C,H,W]; context is not read."""
        return x + as_map(self.attn(tokens(self.norm(x))), x)


class SpatialTransformer(Part):
    """x + proj_out(body(proj_in(norm(x)))): [B,C,H,W] -> [B,C,H,W] (Rombach et al. 2022, appendix E.2.1).

    `body` has blocks of self-attention, cross-attention to the context (where one is given) and a GEGLU feed-forward, each behind a layer norm.
    proj_out starts at zero; the rest is born by its number of inputs, as in the released code: with a fixed small deviation the context of a
    narrow net comes through some ten times weaker.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        heads: int = 8
        depth: int = 1
        source: int = 0                      # width of the context's tokens; 0: no cross-attention
        norm: Spec = field(default_factory=lambda: GroupNorm.Config(eps=1e-6))
        join: str = "conv"                   # how files hold proj_in and proj_out: "conv" (SD 1), a 1x1 convolution, or "linear" (SD 2)

    def __init__(self, c: Config):
        super().__init__()
        if c.join not in ("conv", "linear"):
            raise UserError(f"join={c.join!r}", "it is conv or linear")
        self.norm, self.source = build(c.norm, width=c.width), c.source
        self.proj_in, self.proj_out = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)
        block = PreNorm.Config(attn=Attention.Config(bias="out"), cross=Attention.Config(bias="out", source=c.source) if c.source else None,
                               mlp=GatedMLP.Config(act="gelu", ratio=4.0, bias="gate up down"))
        self.body = Transformer(Transformer.Config(width=c.width, depth=c.depth, heads=c.heads, norm=None, init=FanInInit.Config(), block=block))
        zeroed(self.proj_out)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B,C,H,W], context [B,S,source]. Raises UserError for a context of another width."""
        if context is not None and self.source and context.shape[-1] != self.source:
            raise UserError(f"a context of width {context.shape[-1]}", f"this U-Net reads {self.source}")
        return x + as_map(self.proj_out(self.body(self.proj_in(tokens(self.norm(x))), context)), x)


class Shrink(Part):
    """Half the size by a 3x3 convolution of stride 2: [B,C,H,W] -> [B,C,H/2,W/2]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        pad: str = "both"                    # "both": one place on each side; "end": only right and below (Ho et al., KL-VAE)

    def __init__(self, c: Config):
        super().__init__()
        if c.pad not in ("both", "end"):
            raise UserError(f"pad={c.pad!r}", "it is both or end")
        self.end = c.pad == "end"
        self.conv = nn.Conv2d(c.width, c.width, 3, 2, 0 if self.end else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.end else x)


class Grow(Part):
    """Double the size: every place four times, then a 3x3 convolution: [B,C,H,W] -> [B,C,2H,2W]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.conv = nn.Conv2d(c.width, c.width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
