"""NFNet. Shapes: B batch, C channels, h w the size of a map, D width of `pooled`."""
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.check import check_image
from polysense.nn.conv import ScaledConv
from polysense.nn.drop import drop_path
from polysense.towers.encoded import Encoded, Tower

GAMMA = 1.7015043497085571                   # 1 / deviation of gelu(x) for x ~ N(0, 1): keeps the variance of what passes


def active(x: Tensor) -> Tensor:
    return F.gelu(x) * GAMMA


class SqueezeExcite(Part):
    """2 sigmoid(W2 relu(W1 mean(x))) * x: [B,C,H,W] -> the same; the factor 2 keeps the variance (Brock et al. 2021, section 4.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        ratio: float = 0.5
        divisor: int = 8

    def __init__(self, c: Config):
        super().__init__()
        hidden = max(c.divisor, int(c.ratio * c.width + c.divisor / 2) // c.divisor * c.divisor)
        self.fc1, self.fc2 = nn.Linear(c.width, hidden), nn.Linear(hidden, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))[:, :, None, None] * x


class NormFree(Part):
    """shortcut + alpha * skip * f(beta * act(x)), f = 1x1, 3x3, 3x3 in groups, 1x1, squeeze-excite: [B,into,H,W] -> [B,width,H/stride,W/stride].

    `skip` is a learned scalar that starts at 0. A block that changes the shape has a shortcut of its own, which reads beta * act(x) too.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # 0: set by the tower, as width, stride, beta and drop_path
        width: int = 0
        stride: int = 0
        beta: float = 0.0
        alpha: float = 0.2
        group: int = 128                     # channels of a group
        bottleneck: float = 0.5
        drop_path: float = 0.0
        conv: Spec = field(default_factory=ScaledConv.Config)
        gate: Spec = field(default_factory=SqueezeExcite.Config)

    def __init__(self, c: Config):
        super().__init__()
        inner = int(c.width * c.bottleneck)
        groups = inner // c.group
        if groups * c.group != inner:
            raise UserError(f"{inner} inner channels do not divide into groups of {c.group}", "choose widths that do")
        self.conv1 = build(c.conv, into=c.into, out=inner, kernel=1, stride=1)
        self.conv2 = build(c.conv.but(groups=groups), into=inner, out=inner, kernel=3, stride=c.stride)
        self.conv3 = build(c.conv.but(groups=groups), into=inner, out=inner, kernel=3, stride=1)
        self.conv4 = build(c.conv, into=inner, out=c.width, kernel=1, stride=1)
        self.shortcut = build(c.conv, into=c.into, out=c.width, kernel=1, stride=1) if c.into != c.width or c.stride > 1 else None
        self.gate, self.skip = build(c.gate, width=c.width), nn.Parameter(torch.zeros(()))
        self.alpha, self.beta, self.stride, self.drop_path = c.alpha, c.beta, c.stride, c.drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = active(x) * self.beta
        if self.shortcut is not None:
            small = F.avg_pool2d(y, 2, self.stride, ceil_mode=True, count_include_pad=False) if self.stride > 1 else y
            x = self.shortcut(small)
        y = self.conv3(active(self.conv2(active(self.conv1(y)))))
        y = self.gate(self.conv4(active(y)))
        return x + self.alpha * self.skip * drop_path(y, self.drop_path, self.training)


class NFNet(Tower):
    """Residual network without any normalisation of activations (Brock et al. 2021).

    The variance of the residual stream is known beforehand: it is 1 behind a transition, grows by alpha^2 a block, and every block scales its
    input to variance 1 by its beta. So no sample sees another one, and train and eval mode differ by dropout and stochastic depth alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        layers: tuple[int, ...] = (1, 2, 6, 3)                       # of F0; F_k has (k + 1) times as many
        widths: tuple[int, ...] = (256, 512, 1536, 1536)
        stem: tuple[int, ...] = (16, 32, 64, 128)                    # widths of its four convolutions, of strides 2 1 1 2
        stem_strides: tuple[int, ...] = (2, 1, 1, 2)
        last: int = 3072                                             # width of the last 1x1 convolution, and of `pooled`
        block: NormFree.Config = field(default_factory=NormFree.Config)
        drop_path: float = 0.0                                       # of the last block; grows linearly from 0 at the first
        dropout: float = 0.0                                         # of `pooled`
        channels: int = 3

        @property
        def width(self) -> int:
            return self.last

        @property
        def betas(self) -> tuple[tuple[float, ...], ...]:
            """1 / sqrt(expected variance) of what each block of each stage reads."""
            out, variance = [], 1.0
            for count in self.layers:
                stage = []
                for b in range(count):
                    stage.append(variance ** -0.5)
                    variance = (variance if b else 1.0) + self.block.alpha ** 2
                out.append(tuple(stage))
            return tuple(out)

    def __init__(self, c: Config):
        super().__init__()
        conv, into = c.block.conv, c.channels
        self.stem = nn.ModuleList()
        for width, stride in zip(c.stem, c.stem_strides, strict=True):
            self.stem.append(build(conv, into=into, out=width, kernel=3, stride=stride))
            into = width
        self.stages: Any = nn.ModuleList()
        done, total = 0, sum(c.layers)
        for s, (count, width, betas) in enumerate(zip(c.layers, c.widths, c.betas, strict=True)):
            stage = nn.Sequential()
            for b in range(count):
                stage.append(build(c.block, into=into, width=width, stride=2 if s and not b else 1, beta=betas[b],
                                   drop_path=c.drop_path * done / max(1, total - 1)))
                into, done = width, done + 1
            self.stages.append(stage)
        self.final = build(conv, into=into, out=c.last, kernel=1, stride=1)
        self.channels, self.width, self.dropout = c.channels, c.width, c.dropout

    def features(self, image: Tensor) -> list[Tensor]:
        """image [B,channels,H,W] -> the map [B,C,h,w] after each stage, then the last one, [B,D,h,w], behind its activation."""
        check_image(image, self.channels)
        x = self.stem[0](image.contiguous(memory_format=torch.channels_last))
        for conv in self.stem[1:]:
            x = conv(active(x))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [*maps, active(self.final(x))]

    def forward(self, image: Tensor) -> Encoded:
        """image [B,channels,H,W] -> tokens [B,h*w,D], the places of the last map, and pooled [B,D], their mean."""
        tokens = self.features(image)[-1].flatten(2).transpose(1, 2)
        return Encoded(tokens=tokens, pooled=F.dropout(tokens.mean(1), self.dropout, self.training))

    def dense(self, image: Tensor) -> Tensor:
        """image [B,channels,H,W] -> [B,h,w,D]: the places whose mean is `pooled`."""
        return self.features(image)[-1].permute(0, 2, 3, 1)
