"""The layers of LeNet-5 as it was in 1998, up to F6 (LeCun et al. 1998, section II-B). Shapes: B batch, C channels, H x W pixels."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.check import check_image
from polysense.towers.encoded import Encoded, Tower

# Which maps of S2 each map of C3 reads (table I).
TABLE = (*(tuple((i + k) % 6 for k in range(3)) for i in range(6)), *(tuple((i + k) % 6 for k in range(4)) for i in range(6)),
         (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), tuple(range(6)))

REACH, SLOPE = 1.7159, 2 / 3


def squash(x: Tensor) -> Tensor:
    """A tanh(2x/3): +-1 is where its second derivative is largest, and squash(+-1) = +-1 (appendix A)."""
    return REACH * torch.tanh(SLOPE * x)


def spread(weight: Tensor, heard: int) -> None:
    """U(-2.4/F, 2.4/F) of a unit that hears F others (appendix A)."""
    nn.init.uniform_(weight, -2.4 / heard, 2.4 / heard)


class Grey(Part):
    """[B,3,H,W] -> [B,1,H,W]: the mean over colours. Raises UserError for another number of channels."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        super().__init__()

    def forward(self, image: Tensor) -> Tensor:
        check_image(image, 3)
        return image.mean(1, keepdim=True)


class Subsample(Part):
    """squash(coefficient * mean of 2x2 places + bias), two numbers a channel: [B,C,H,W] -> [B,C,H/2,W/2]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int

    def __init__(self, c: Config):
        super().__init__()
        self.coefficient, self.bias = nn.Parameter(torch.ones(c.width)), nn.Parameter(torch.zeros(c.width))

    def forward(self, x: Tensor) -> Tensor:
        return squash(self.coefficient[:, None, None] * F.avg_pool2d(x, 2) + self.bias[:, None, None])


class TableConv(Part):
    """A convolution whose maps read only those that a table names: `kernels` [K,5,5], one for each pair of the table, and a bias a map."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        table: tuple[tuple[int, ...], ...]
        side: int = 5

    out: Tensor
    inn: Tensor

    def __init__(self, c: Config):
        super().__init__()
        pairs = torch.tensor([(o, i) for o, row in enumerate(c.table) for i in row], device="cpu")
        self.register_buffer("out", pairs[:, 0].clone(), persistent=False)
        self.register_buffer("inn", pairs[:, 1].clone(), persistent=False)
        self.kernels, self.bias = nn.Parameter(torch.empty(len(pairs), c.side, c.side)), nn.Parameter(torch.zeros(len(c.table)))
        self.shape = (len(c.table), c.into, c.side, c.side)
        at = 0
        for row in c.table:
            spread(self.kernels[at:at + len(row)].data, len(row) * c.side ** 2)
            at += len(row)

    @property
    def weight(self) -> Tensor:
        """[maps,into,side,side], zero where the table has no connection."""
        return self.kernels.new_zeros(self.shape).index_put((self.out, self.inn), self.kernels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class Net1998(Tower):
    """C1 to F6. `padding` empty pixels around the picture make 28x28 the 32x32 that it reads."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        padding: int = 2
        empty: float = -0.1                  # value of the background

        @property
        def width(self) -> int:
            return 84

    def __init__(self, c: Config):
        super().__init__()
        self.grey = Grey(Grey.Config())
        self.c1, self.s2 = nn.Conv2d(1, 6, 5), Subsample(Subsample.Config(width=6))
        self.c3, self.s4 = TableConv(TableConv.Config(into=6, table=TABLE)), Subsample(Subsample.Config(width=16))
        self.c5, self.f6 = nn.Conv2d(16, 120, 5), nn.Linear(120, 84)
        for layer in (self.c1, self.c5, self.f6):
            spread(layer.weight, layer.weight[0].numel())
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.padding, self.empty, self.width = c.padding, c.empty, c.width

    def map(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> S4 [B,16,h,w]."""
        x = F.pad(self.grey(image), (self.padding,) * 4, value=self.empty)
        x = self.s2(squash(self.c1(x)))
        return self.s4(squash(self.c3(x)))

    def dense(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,84]: F6 for each window of 32 x 32 pixels, every fourth one."""
        return self._dense(self.map(image))

    def forward(self, image: Tensor) -> Encoded:
        """image [B,3,H,W] -> tokens [B,hw,16], the places of S4, and pooled [B,84], F6 (its mean over windows of a larger picture)."""
        x = self.map(image)
        return Encoded(tokens=x.flatten(2).transpose(1, 2), pooled=self._dense(x).mean((1, 2)))

    def _dense(self, x: Tensor) -> Tensor:
        return squash(self.f6(squash(self.c5(x)).permute(0, 2, 3, 1)))
