"""Residual blocks of convolutional networks and what goes with them. All maps are [B,C,H,W]."""
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.conv import Conv, ConvNorm
from polysense.nn.norm import BatchNorm2d

STRIDES = ("1x1", "3x3", "pool")


class Stem(Part):
    """relu(norm(conv)), then a max pool: 7x7/2 and 3x3/2 for ImageNet (the default), 3x3/1 and none for CIFAR (He et al. 2016)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0
        out: int = 0
        kernel: int = 7
        stride: int = 2
        pool: int = 3                        # side of the max pool, of stride 2; 0: none
        conv: Spec = field(default_factory=Conv.Config)
        norm: Spec = field(default_factory=BatchNorm2d.Config)

        @property
        def total_stride(self) -> int:
            return self.stride * (2 if self.pool else 1)

    def __init__(self, c: Config):
        super().__init__()
        self.conv = build(c.conv, into=c.into, out=c.out, kernel=c.kernel, stride=c.stride)
        self.norm, self.pool = build(c.norm, width=c.out), c.pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return F.max_pool2d(x, self.pool, 2, self.pool // 2) if self.pool else x


CIFAR_STEM = Stem.Config(kernel=3, stride=1, pool=0)


class Project(ConvNorm):
    """Option B: a 1x1 convolution and a norm where the shape changes. stride_in "pool": average pooling before a stride-1 convolution (CLIP)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ConvNorm.Config):
        kernel: int = 1
        conv: Spec | None = None             # None: the block's, as its norm
        norm: Spec | None = None
        stride_in: str = "1x1"               # or "pool"

    def __init__(self, c: Config):
        if c.stride_in not in ("1x1", "pool"):
            raise UserError(f"no stride_in={c.stride_in!r} in a shortcut", "it is '1x1' or 'pool'")
        super().__init__(c.but(stride=1) if c.stride_in == "pool" else c)
        self.pool = c.stride if c.stride_in == "pool" else 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(x, self.pool) if self.pool > 1 else x)


class Pad(Part):
    """Option A: every stride-th place, new channels zero, no parameters (the CIFAR nets)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0
        out: int = 0
        stride: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.stride, self.more = c.stride, c.out - c.into

    def forward(self, x: Tensor) -> Tensor:
        before = self.more // 2
        return F.pad(x[..., ::self.stride, ::self.stride], (0, 0, 0, 0, before, self.more - before))


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(Spec):
    """What both kinds of block are made of. into, width and stride are set by the tower."""
    into: int = 0
    width: int = 0                           # of the inner convolutions
    stride: int = 0
    conv: Spec = field(default_factory=Conv.Config)
    norm: Spec = field(default_factory=BatchNorm2d.Config)
    shortcut: Spec | None = field(default_factory=Project.Config)    # where the shape changes: Project (B) or Pad (A); None: a plain net
    last_gamma: float = 1.0                  # weight of the last norm at birth; 0: every block starts as its shortcut (Goyal et al. 2017, CLIP)


class _Residual(Part):
    """relu(F(x) + shortcut(x)): the activation comes after the addition (He et al. 2016, equation 1)."""
    plain = False

    def _finish(self, c: ResidualConfig, out: int, last: nn.Module) -> None:
        nn.init.constant_(last.weight, c.last_gamma)  # type: ignore[arg-type]
        self.plain, self.shortcut = c.shortcut is None, None
        if c.shortcut is not None and (c.stride != 1 or c.into != out):
            self.shortcut = build(c.shortcut, into=c.into, out=out, stride=c.stride, norm=c.norm, conv=c.conv)

    def branch(self, x: Tensor) -> Tensor:
        """F(x), before the addition."""
        raise TypeError("a residual block defines its branch")

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if not self.plain:
            y = y.add_(x if self.shortcut is None else self.shortcut(x))
        return F.relu(y, inplace=True)


class Basic(_Residual):
    """3x3, norm, ReLU, 3x3, norm (ResNet-18, -34 and the CIFAR nets)."""
    expansion = 1

    @dataclass(frozen=True, kw_only=True)
    class Config(ResidualConfig):
        pass

    def __init__(self, c: Config):
        super().__init__()
        self.conv1 = build(c.conv, into=c.into, out=c.width, kernel=3, stride=c.stride)
        self.norm1 = build(c.norm, width=c.width)
        self.conv2 = build(c.conv, into=c.width, out=c.width, kernel=3, stride=1)
        self.norm2 = build(c.norm, width=c.width)
        self._finish(c, c.width, self.norm2)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))


class Bottleneck(_Residual):
    """1x1, 3x3, 1x1 to four times the width, each with a norm (ResNet-50 and deeper)."""
    expansion = 4

    @dataclass(frozen=True, kw_only=True)
    class Config(ResidualConfig):
        stride_in: str = "3x3"               # "1x1": the first convolution has the stride (the paper); "3x3": the second (torchvision, timm: v1.5);
        #                                      "pool": none has, the map is average-pooled after the second (CLIP)

    def __init__(self, c: Config):
        super().__init__()
        if c.stride_in not in STRIDES:
            raise UserError(f"no stride_in={c.stride_in!r}", f"it is one of {', '.join(STRIDES)}")
        strides, out = [c.stride if c.stride_in == kind else 1 for kind in STRIDES], self.expansion * c.width
        self.conv1 = build(c.conv, into=c.into, out=c.width, kernel=1, stride=strides[0])
        self.norm1 = build(c.norm, width=c.width)
        self.conv2 = build(c.conv, into=c.width, out=c.width, kernel=3, stride=strides[1])
        self.norm2 = build(c.norm, width=c.width)
        self.pool = strides[2]
        self.conv3 = build(c.conv, into=c.width, out=out, kernel=1, stride=1)
        self.norm3 = build(c.norm, width=out)
        self._finish(c, out, self.norm3)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        return self.norm3(self.conv3(F.avg_pool2d(x, self.pool) if self.pool > 1 else x))


def make_stages(block: Spec, layers: tuple[int, ...], base: int, into: int) -> nn.ModuleList:
    """`stages.{s}.{b}`: stage s has layers[s] blocks of width base * 2**s, its first block has stride 2 except in the first stage."""
    stages = nn.ModuleList()
    for s, count in enumerate(layers):
        stage = nn.Sequential()
        for b in range(count):
            made = build(block, into=into, width=base * 2 ** s, stride=2 if s and not b else 1)
            into = base * 2 ** s * type(made).expansion
            stage.append(made)
        stages.append(stage)
    return stages
