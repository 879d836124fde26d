"""Plain convolutional networks: LeNet, AlexNet, VGG. Shapes: B batch, C channels of the last map, h w its size, D width of the last dense layer."""
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Configured, Spec
from polysense.base.system import Part
from polysense.nn.activation import activation
from polysense.nn.build import build
from polysense.nn.check import check_image
from polysense.towers.encoded import Encoded, Tower

DROPS = ("before", "after")


class PlainInit(Configured):
    """Every weight N(0, std), every bias 0, but 1 in the layers named in `ones` (Krizhevsky et al. 2012, section 5).

    std None: Glorot's uniform in place of it, which makes a very deep plain net trainable without a shallower one (Simonyan & Zisserman, 2.1.1).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        std: float | None = 0.01
        ones: tuple[str, ...] = ()           # names of layers, as `stages.1.0.conv`

    def __init__(self, c: Config):
        self.c = c

    def __call__(self, net: nn.Module) -> None:
        for name, m in net.named_modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(m.weight) if self.c.std is None else nn.init.normal_(m.weight, std=self.c.std)
                if m.bias is not None:
                    nn.init.constant_(m.bias, float(name in self.c.ones))


def _large_enough(x: Tensor, side: int) -> None:
    if min(x.shape[-2:]) < side:
        raise UserError(f"a map of {x.shape[-2]} x {x.shape[-1]} places where the network reads {side} x {side}", "give it a larger picture")


class Pool(Part):
    """Every `side` x `side` places become one: their largest, or their mean. AlexNet's overlap: side 3, stride 2."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        side: int = 2
        stride: int = 2
        kind: str = "max"                    # or "mean"

    def __init__(self, c: Config):
        super().__init__()
        if c.kind not in ("max", "mean"):
            raise UserError(f"no pool {c.kind!r}", "it is max or mean")
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        _large_enough(x, self.c.side)
        return (F.max_pool2d if self.c.kind == "max" else F.avg_pool2d)(x, self.c.side, self.c.stride)


class Row(Part):
    """A convolution with bias, its activation, and where there are such a norm and a pool: [B,into,H,W] -> [B,out,H',W']."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # 0: set by the tower
        out: int
        kernel: int = 3
        stride: int = 1
        padding: int | None = None           # None: kernel // 2
        groups: int = 1
        act: str = "relu"
        norm: Spec | None = None             # behind the activation
        pool: Spec | None = None             # ends the stage

    def __init__(self, c: Config):
        super().__init__()
        self.conv = nn.Conv2d(c.into, c.out, c.kernel, c.stride, c.kernel // 2 if c.padding is None else c.padding, groups=c.groups)
        self.act = activation(c.act)
        self.norm = c.norm.build() if c.norm is not None else None
        self.pool = c.pool.build() if c.pool is not None else None

    def active(self, x: Tensor) -> Tensor:
        """The map before norm and pool. Raises UserError for one smaller than the kernel."""
        _large_enough(x, self.conv.kernel_size[0] - 2 * self.conv.padding[0])  # type: ignore[operator]
        return self.act(self.conv(x))

    def after(self, x: Tensor) -> Tensor:
        """Norm and pool of `active`."""
        x = x if self.norm is None else self.norm(x)
        return x if self.pool is None else self.pool(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.active(x))


class ConvNet(Tower):
    """Rows of convolutions, `stages.{s}.{k}` (a pool ends a stage), then dense layers `hidden.{i}` over the whole last map; pooled is the last
    of them. The dense layers read a map of `grid` x `grid` places; another is averaged to that (as torchvision does), or read place by place by
    `dense`, where they become convolutions over it (Simonyan & Zisserman 2015, section 3.2).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        rows: tuple[Row.Config, ...]
        grid: int
        hidden: tuple[int, ...] = (4096, 4096)
        act: str = "relu"                    # of the dense layers
        dropout: float = 0.0
        drop: str = "after"                  # the dense layers drop what they say ("after", VGG) or what they hear ("before", AlexNet)
        channels: int = 3
        front: Spec | None = None            # what is done to the picture first
        borrowed: int = 4                    # a Start from a shallower net lends so many of its first convolutions, and its dense layers
        init: Spec = field(default_factory=PlainInit.Config)

        @property
        def width(self) -> int:
            return self.hidden[-1] if self.hidden else self.rows[-1].out * self.grid ** 2

    def __init__(self, c: Config):
        super().__init__()
        if c.drop not in DROPS:
            raise UserError(f"drop={c.drop!r}", f"it is one of {', '.join(DROPS)}")
        self.front = c.front.build() if c.front is not None else None
        self.stages, into = nn.ModuleList([nn.Sequential()]), 1 if c.front is not None else c.channels
        for i, row in enumerate(c.rows):
            self.stages[-1].append(build(row, into=into))  # type: ignore[operator]
            into = row.out
            if row.pool is not None and i < len(c.rows) - 1:
                self.stages.append(nn.Sequential())
        sizes = (into * c.grid ** 2, *c.hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, c.hidden))
        self.act, self.dropout, self.drop = activation(c.act), c.dropout, c.drop
        self.grid, self.channels, self.width, self.borrowed = c.grid, c.channels, c.width, c.borrowed
        c.init.build()(self)

    @property
    def rows(self) -> list[Any]:
        return [row for stage in self.stages for row in stage]  # type: ignore[attr-defined]

    def features(self, image: Tensor) -> list[Tensor]:
        """image [B,channels,H,W] -> what each convolution says behind its activation, before norm and pool: [B,C,h,w] each.

        Raises UserError for a wrong number of channels, or a picture too small for the pools.
        """
        check_image(image, self.channels)
        x, maps, before = image if self.front is None else self.front(image), list[Tensor](), None
        for row in self.rows:
            x = row.active(x if before is None else before.after(x))
            maps.append(x)
            before = row
        return maps

    def map(self, image: Tensor) -> Tensor:
        """image [B,channels,H,W] -> the last map [B,C,h,w], pooled."""
        return self.rows[-1].after(self.features(image)[-1])

    def forward(self, image: Tensor) -> Encoded:
        """image [B,channels,H,W] -> tokens [B,h*w,C], the places of the last map, and pooled [B,D], the last dense layer."""
        x = self.map(image)
        fitting = x if x.shape[-2:] == (self.grid, self.grid) else F.adaptive_avg_pool2d(x, self.grid)
        y = fitting.flatten(1)
        for layer in self.hidden:
            y = self._dropped(self.act(layer(self._dropped(y, "before"))), "after")
        return Encoded(tokens=x.flatten(2).transpose(1, 2), pooled=y)

    def dense(self, image: Tensor) -> Tensor:
        """image [B,channels,H,W] -> [B,h,w,D]: the dense layers as convolutions over the whole map, a `pooled` for each window of `grid` places.

        Raises UserError where the map is smaller than a window.
        """
        x = self.map(image)
        if min(x.shape[-2:]) < self.grid:
            raise UserError(f"a picture of {image.shape[-2]} x {image.shape[-1]} pixels", f"its last map is smaller than the {self.grid} x "
                            f"{self.grid} places that the dense layers read: give a larger one")
        if not self.hidden:
            x = F.unfold(x, self.grid).unflatten(2, (x.shape[-2] - self.grid + 1, -1))
        for i, layer in enumerate(self.hidden):
            side = 1 if i else self.grid
            x = F.conv2d(self._dropped(x, "before"), layer.weight.view(len(layer.weight), -1, side, side), layer.bias)  # type: ignore[operator]
            x = self._dropped(self.act(x), "after")
        return x.permute(0, 2, 3, 1)

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a shallower net the first `borrowed` convolutions and the dense layers; the rest stays as it is (Simonyan & Zisserman 2015, 3.1)."""
        own = self.state_dict()
        if weights.keys() == own.keys():
            return weights
        first = [k.removesuffix("conv.weight") for k in weights if k.endswith("conv.weight")][:self.borrowed]
        return own | {k: v for k, v in weights.items() if k.startswith(("hidden.", *first))}

    def _dropped(self, x: Tensor, where: str) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout and where == self.drop else x
