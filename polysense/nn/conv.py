"""Convolutions for slots. All maps are [B,C,H,W]; a kernel of K has padding K//2, so only the stride changes the size."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.norm import BatchNorm2d


class Conv(Part, nn.Conv2d):
    """A convolution without bias, He-initialised over the fan out (He et al. 2015, equation 14)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # 0: set by the owner, as all here
        out: int = 0
        kernel: int = 0
        stride: int = 0
        groups: int = 1

    def __init__(self, c: Config):
        nn.Conv2d.__init__(self, c.into, c.out, c.kernel, c.stride or 1, c.kernel // 2, groups=c.groups, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class StandardisedConv(Conv):
    """A convolution whose filters have zero mean and unit variance (Qiao et al. 2019); with group norm it stands in for batch norm (BiT)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Conv.Config):
        eps: float = 1e-6

    def __init__(self, c: Config):
        super().__init__(c)
        self.eps = c.eps

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=self.eps)      # a filter is a row: mean and variance over the fan in
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv(Part, nn.Conv2d):
    """Scaled weight standardisation (Brock et al. 2021): gain * (W - mean) / (deviation * sqrt(fan in)), a learned gain a filter, and a bias.

    Padding is such that the output has size / stride places, rounded up; what is odd of it lies below and at the right.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0
        out: int = 0
        kernel: int = 0
        stride: int = 0
        groups: int = 1
        eps: float = 1e-5

    def __init__(self, c: Config):
        nn.Conv2d.__init__(self, c.into, c.out, c.kernel, c.stride or 1, groups=c.groups)
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="linear")
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.gain, self.eps = nn.Parameter(torch.ones(c.out)), c.eps

    @property
    def standardised(self) -> Tensor:
        """The filters that are used, [out,into/groups,k,k]: zero mean and variance gain^2 / fan in."""
        rows = F.layer_norm(self.weight, self.weight.shape[1:], eps=self.eps)
        return rows * (self.gain * self.weight[0].numel() ** -0.5).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        k, s = self.kernel_size[0], self.stride[0]
        high, wide = (max(0, (-(-n // s) - 1) * s + k - n) for n in x.shape[-2:])
        if high == wide and high % 2 == 0:
            return F.conv2d(x, self.standardised, self.bias, self.stride, high // 2, 1, self.groups)
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.standardised, self.bias, self.stride, 0, 1, self.groups)


class ConvNorm(Part):
    """norm(conv(x))."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0
        out: int = 0
        kernel: int = 0
        stride: int = 0
        conv: Spec | None = field(default_factory=Conv.Config)
        norm: Spec | None = field(default_factory=BatchNorm2d.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.conv = build(c.conv or Conv.Config(), into=c.into, out=c.out, kernel=c.kernel, stride=c.stride)
        self.norm = build(c.norm or BatchNorm2d.Config(), width=c.out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
