"""CLIP's ResNet. Shapes: B batch, C channels of the last map, h w its size, D width of the joint space."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.nn.attention import Attention
from polysense.nn.check import check_image
from polysense.nn.conv import ConvNorm
from polysense.nn.position import fit_positions
from polysense.nn.residual import Bottleneck, Project, make_stages
from polysense.towers.encoded import Encoded, Tower


class AttentionPool(Attention):
    """Attention pooling (Radford et al. 2021, section 2.4): the query is the mean token, keys and values are the mean and all places, each
    with its learned position. Only that one query is computed."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        grid: int                            # side of the map that `position` stands for; others are interpolated

    def __init__(self, c: Config):
        super().__init__(c)
        self.grid = (c.grid, c.grid)
        self.position = nn.Parameter(torch.randn(1, 1 + c.grid ** 2, c.width) * c.width ** -0.5)
        for m in (self.q, self.k, self.v, self.out):
            nn.init.normal_(m.weight, std=c.width ** -0.5)
            nn.init.zeros_(m.bias)

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """Positions trained for another grid, interpolated to this one."""
        return fit_positions(value, 1, self.grid) if name == "position" and value.ndim == 3 else value

    def tokens(self, image_map: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,1+h*w,C]: the mean, then all places, with positions."""
        x = image_map.flatten(2).transpose(1, 2)
        grid = (image_map.shape[2], image_map.shape[3])
        return torch.cat([x.mean(1, keepdim=True), x], 1) + fit_positions(self.position, 1, grid)

    def pool(self, image_map: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,D]."""
        x = self.tokens(image_map)
        return self(x[:, :1], x)[:, 0]


class ClipResNet(Tower):
    """The modified ResNet of CLIP: three stem convolutions and an average pool, average pools in place of strides, attention pooling.

    Its pooled feature already lies in the joint space (`pool.out` is the projection), so the system's image head is `Nothing`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        image_size: int = 224
        layers: tuple[int, ...] = (3, 4, 6, 3)
        base: int = 64                       # channels of the stem (64 for RN50, 80 for RN50x4)
        heads: int = 32                      # of the attention pool: base / 2 in OpenAI's
        dim: int = 1024                      # of the joint space
        channels: int = 3
        block: Spec = field(default_factory=lambda: Bottleneck.Config(stride_in="pool", shortcut=Project.Config(stride_in="pool"), last_gamma=0.0))

        @property
        def width(self) -> int:
            return self.dim

        @property
        def stride(self) -> int:
            """Pixels between two places of the last map."""
            return 4 * 2 ** (len(self.layers) - 1)

    def __init__(self, c: Config):
        super().__init__()
        if c.image_size % c.stride:
            raise UserError(f"image_size={c.image_size} does not divide by {c.stride}", "choose a multiple")
        half, last = c.base // 2, c.base * 2 ** (len(c.layers) - 1) * 4
        self.stem = nn.ModuleList(ConvNorm.Config(into=i, out=o, kernel=3, stride=s).build()
                                  for i, o, s in ((c.channels, half, 2), (half, half, 1), (half, c.base, 1)))
        self.stages = make_stages(c.block, c.layers, c.base, c.base)
        self.pool = AttentionPool.Config(width=last, heads=c.heads, out_width=c.dim, grid=c.image_size // c.stride).build()
        self.channels, self.stride, self.width = c.channels, c.stride, c.dim

    def features(self, image: Tensor) -> list[Tensor]:
        """image [B,channels,H,W] -> the map [B,C,h,w] after each stage. Raises UserError for wrong channels or an odd size."""
        check_image(image, self.channels)
        if image.shape[2] % self.stride or image.shape[3] % self.stride:
            raise UserError(f"an image of {image.shape[2]}x{image.shape[3]} pixels", f"choose sides that are multiples of {self.stride}")
        x, maps = image.contiguous(memory_format=torch.channels_last), []      # the convolutions' own order: 1.3 times as fast
        for layer in self.stem:
            x = F.relu(layer(x))
        x = F.avg_pool2d(x, 2)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Encoded:
        """image [B,channels,H,W] -> tokens [B,h*w,C], the places of the last map, and pooled [B,D] in the joint space."""
        last = self.features(image)[-1]
        return Encoded(tokens=last.flatten(2).transpose(1, 2), pooled=self.pool.pool(last))

    def dense(self, image: Tensor) -> Tensor:
        """image [B,channels,H,W] -> [B,h,w,D]: each place's own value, of which `pooled` is a mixture (MaskCLIP, Zhou et al. 2022)."""
        last = self.features(image)[-1]
        return self.pool.values(self.pool.tokens(last))[:, 1:].unflatten(1, last.shape[2:])
