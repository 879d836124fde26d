"""ResNet. Shapes: B batch, C channels of the last map, h w its size."""
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polysense.base.spec import Spec
from polysense.nn.build import build
from polysense.nn.check import check_image
from polysense.nn.residual import Bottleneck, Stem, make_stages
from polysense.towers.encoded import Encoded, Tower


class ResNet(Tower):
    """Deep residual network (He et al. 2016): stem, stages of blocks whose width doubles and whose map halves, global average.

    ResNet-50 is the default; 18 and 34 take Basic blocks; the CIFAR nets three stages, base 16 and CIFAR_STEM; the plain control net a
    block with `shortcut=None`. `freeze_norm` keeps batch statistics fixed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        layers: tuple[int, ...] = (3, 4, 6, 3)                       # blocks a stage
        base: int = 64                                               # channels of the stem and of the first stage's inner convolutions
        block: Spec = field(default_factory=Bottleneck.Config)       # Basic or Bottleneck
        stem: Spec = field(default_factory=Stem.Config)              # Stem.Config() for ImageNet, CIFAR_STEM
        channels: int = 3

        @property
        def width(self) -> int:
            return self.base * 2 ** (len(self.layers) - 1) * type(self.block).owner.expansion  # type: ignore[attr-defined]

        @property
        def stride(self) -> int:
            """Pixels between two places of the last map."""
            return self.stem.total_stride * 2 ** (len(self.layers) - 1)  # type: ignore[attr-defined]

    def __init__(self, c: Config):
        super().__init__()
        self.stem = build(c.stem, into=c.channels, out=c.base)
        self.stages = make_stages(c.block, c.layers, c.base, c.base)
        self.channels, self.width = c.channels, c.width
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, image: Tensor) -> list[Tensor]:
        """image [B,channels,H,W] -> the map [B,C,h,w] after each stage. Raises UserError for a wrong number of channels."""
        check_image(image, self.channels)
        x, maps = self.stem(image.contiguous(memory_format=torch.channels_last)), []      # the convolutions' own order: 1.3 times as fast
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Encoded:
        """image [B,channels,H,W] -> tokens [B,h*w,C], the places of the last map, and pooled [B,C], their mean."""
        tokens = self.features(image)[-1].flatten(2).transpose(1, 2)
        return Encoded(tokens=tokens, pooled=tokens.mean(1))

    def dense(self, image: Tensor) -> Tensor:
        """image [B,channels,H,W] -> [B,h,w,C]: the places whose mean is `pooled`."""
        return self.features(image)[-1].permute(0, 2, 3, 1)
