"""BiT, the ResNet-v2 of Big Transfer. Shapes: B batch, C channels of the last map, h w its size."""
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.check import check_image
from polysense.nn.conv import StandardisedConv
from polysense.nn.norm import GroupNorm
from polysense.nn.residual import make_stages
from polysense.towers.encoded import Encoded, Tower


class PreActivation(Part):
    """Pre-activated bottleneck: every norm and ReLU stands before its convolution and nothing follows the addition (He et al. 2016b, figure 4e).

    A shortcut that changes shape reads the first activation and has no norm of its own.
    """
    expansion = 4

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # 0: set by the tower, as width and stride
        width: int = 0
        stride: int = 0
        conv: Spec = field(default_factory=lambda: StandardisedConv.Config(eps=1e-8))
        norm: Spec = field(default_factory=GroupNorm.Config)

    def __init__(self, c: Config):
        super().__init__()
        out = self.expansion * c.width
        self.norm1, self.conv1 = build(c.norm, width=c.into), build(c.conv, into=c.into, out=c.width, kernel=1, stride=1)
        self.norm2, self.conv2 = build(c.norm, width=c.width), build(c.conv, into=c.width, out=c.width, kernel=3, stride=c.stride)
        self.norm3, self.conv3 = build(c.norm, width=c.width), build(c.conv, into=c.width, out=out, kernel=1, stride=1)
        self.shortcut = nn.ModuleDict({"conv": build(c.conv, into=c.into, out=out, kernel=1, stride=c.stride)}) if c.into != out else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        y = self.conv3(F.relu(self.norm3(y)))
        return y + (x if self.shortcut is None else self.shortcut["conv"](active))


class Bit(Tower):
    """ResNet-v2 with group norm and standardised weights (Kolesnikov et al. 2020); the ResNet half of the hybrid ViT and of LiT's peers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        layers: tuple[int, ...] = (3, 4, 6, 3)
        base: int = 64                       # 64 * k for BiT's "xk" models
        block: Spec = field(default_factory=PreActivation.Config)
        channels: int = 3

        @property
        def width(self) -> int:
            return self.base * 2 ** (len(self.layers) - 1) * PreActivation.expansion

        @property
        def stride(self) -> int:
            """Pixels between two places of the last map."""
            return 4 * 2 ** (len(self.layers) - 1)

    def __init__(self, c: Config):
        super().__init__()
        block: PreActivation.Config = c.block  # type: ignore[assignment]
        self.stem = nn.ModuleDict({"conv": build(block.conv, into=c.channels, out=c.base, kernel=7, stride=2)})
        self.stages = make_stages(c.block, c.layers, c.base, c.base)
        self.norm = build(block.norm, width=c.width)
        self.channels, self.width = c.channels, c.width

    def features(self, image: Tensor) -> list[Tensor]:
        """image [B,channels,H,W] -> the map [B,C,h,w] after each stage, the last one normed. Raises UserError for a wrong number of channels."""
        check_image(image, self.channels)
        x, maps = F.max_pool2d(F.pad(self.stem["conv"](image), (1, 1, 1, 1)), 3, 2), []     # the border is 0, not -inf as in ResNet
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [*maps[:-1], F.relu(self.norm(x))]

    def forward(self, image: Tensor) -> Encoded:
        """image [B,channels,H,W] -> tokens [B,h*w,C], the places of the last map, and pooled [B,C], their mean."""
        tokens = self.features(image)[-1].flatten(2).transpose(1, 2)
        return Encoded(tokens=tokens, pooled=tokens.mean(1))

    def dense(self, image: Tensor) -> Tensor:
        """image [B,channels,H,W] -> [B,h,w,C]: the places whose mean is `pooled`."""
        return self.features(image)[-1].permute(0, 2, 3, 1)
