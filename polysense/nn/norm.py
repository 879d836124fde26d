"""Normalisation layers for slots named `norm`. Statistics are taken in float32 whatever the autocast type."""
from dataclasses import dataclass
from math import gcd
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part


class LayerNorm(Part, nn.LayerNorm):
    """Ba et al. 2016, over the last axis. The eps differs by source: 1e-6 (JAX, timm), 1e-12 (BERT, transformers' ViT), 1e-5 (CLIP).

    Under autocast a float32 input gives a float32 output: the residual stream stays in float32 and only the matrix products are lowered.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner
        eps: float = 1e-5

    def __init__(self, c: Config):
        nn.LayerNorm.__init__(self, c.width, eps=c.eps)


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of each place of a map [B,C,H,W] (ConvNeXt, ViTDet, SAM)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(LayerNorm.Config):
        eps: float = 1e-6

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RMSNorm(Part):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, equation 4); the output has the type of the input."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        eps: float = 1e-6

    def __init__(self, c: Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.width)), c.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class _Freezable(nn.Module):
    frozen = False

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


class BatchNorm2d(Part, _Freezable, nn.BatchNorm2d):
    """Ioffe & Szegedy 2015, over batch and places of [B,C,H,W]; `momentum` is the share of the new batch, as in torch."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        eps: float = 1e-5
        momentum: float = 0.1

    def __init__(self, c: Config):
        nn.BatchNorm2d.__init__(self, c.width, eps=c.eps, momentum=c.momentum)


class BatchNorm1d(Part, _Freezable, nn.BatchNorm1d):
    """The same over the batch of [B,C]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        eps: float = 1e-5
        momentum: float = 0.1

    def __init__(self, c: Config):
        nn.BatchNorm1d.__init__(self, c.width, eps=c.eps, momentum=c.momentum)


class SplitNorm(Part, nn.Module):
    """Batch norm of [B,C,H,W] whose statistics are taken over `groups` parts of the batch, one after the other: what so many devices without
    synchronised norms would compute (He et al. 2020, MoCo, section 3.3). Running statistics are means over the parts. Never synchronised over
    ranks: that samples of a part share statistics, and different ones than those of another part, is its purpose."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        groups: int = 8                      # of a batch that they do not divide: the largest common divisor
        eps: float = 1e-5
        momentum: float = 0.1

    def __init__(self, c: Config):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c.width)), nn.Parameter(torch.zeros(c.width))
        self.register_buffer("running_mean", torch.zeros(c.width))
        self.register_buffer("running_var", torch.ones(c.width))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self.groups, self.eps, self.momentum = c.groups, c.eps, c.momentum

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        parts, c = gcd(len(x), self.groups), x.shape[1]
        mean, var = self.running_mean.repeat(parts), self.running_var.repeat(parts)
        side = x.unflatten(0, (parts, -1)).transpose(0, 1).flatten(1, 2)          # part p's channel k becomes channel p * C + k
        y = F.batch_norm(side, mean, var, self.weight.repeat(parts), self.bias.repeat(parts), True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(parts, c).mean(0))
            self.running_var.copy_(var.view(parts, c).mean(0))
            self.num_batches_tracked += 1
        return y.unflatten(1, (parts, c)).transpose(0, 1).flatten(0, 1)


class GroupNorm(Part, nn.GroupNorm):
    """Wu & He 2018, over channel groups of [B,C,H,W]; independent of the batch."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        groups: int = 32
        eps: float = 1e-5

    def __init__(self, c: Config):
        nn.GroupNorm.__init__(self, c.groups, c.width, eps=c.eps)


class ResponseNorm(Part):
    """x / (k + alpha * sum of x^2 over `size` neighbouring channels) ** beta at each place of [B,C,H,W] (Krizhevsky et al. 2012, section 3.3).

    torch's LocalResponseNorm divides alpha by the size; here it is the paper's.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        size: int = 5
        alpha: float = 1e-4
        beta: float = 0.75
        k: float = 2.0

    def __init__(self, c: Config):
        super().__init__()
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        near = self.c.size // 2              # sums of shifted views: torch's own goes through a 3-D pooling, several times as slow
        square = F.pad(x.square(), (0, 0, 0, 0, near, self.c.size - 1 - near))
        total = sum((square.narrow(1, i, x.shape[1]) for i in range(1, self.c.size)), square.narrow(1, 0, x.shape[1]))
        inhibited = self.c.k + self.c.alpha * total
        if self.c.beta != 0.75:
            return x * inhibited.pow(-self.c.beta)
        root = inhibited.sqrt()
        return x / (root * root.sqrt())


def freeze_norm(module: nn.Module) -> nn.Module:
    """Every batch norm in `module` uses and keeps its running statistics from now on, in train mode too, and its affine parameters are frozen.

    Returns `module`. The common way to fine-tune detectors and CLIP's ResNets on small batches.
    """
    for m in module.modules():
        if isinstance(m, _Freezable):
            m.frozen = True
            m.requires_grad_(False).eval()
    return module
