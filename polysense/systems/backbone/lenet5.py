"""LeNet-5: shared weights, local views and subsampling, learned end to end.

    32x32 -> C1 6@28x28 -> S2 6@14x14 -> C3 16@10x10 -> S4 16@5x5 -> C5 120 -> F6 84 -> 10 Gaussian connections

The form of 1998: a subsampling layer averages 2x2 places, multiplies by one learned coefficient, adds one bias and squashes; C3 reads the maps of
S2 through a sparse table (60 kernels, not 96), which breaks the symmetry between its maps; every layer up to F6 squashes with A tanh(2x/3),
A = 1.7159. The outputs are distances to fixed codes, pictures of the classes of 7x12 pixels,

    y_i = sum_j (x_j - w_ij)^2,        loss = y_target + log(exp(-j) + sum_i exp(-y_i))            (equations 7 and 9)

so that a picture of nothing may be far from all of them. `plain` is what is called LeNet today: CONV-POOL-CONV-POOL-FC-FC under softmax.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Part, Preset, Spec, Stage, ViewPlan, final
from polysense.nn.check import check_image
from polysense.nn.head import LinearBias
from polysense.objectives.classify import softmax_ce
from polysense.towers.convnet import ConvNet, PlainInit, Pool, Row
from polysense.towers.encoded import Encoded, Tower

card = Card(
    name="LeNet-5", paper="LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proceedings of the IEEE 1998", year=1998,
    says="Sorts small grey pictures such as handwritten digits into ten classes with seven layers.",
    needs=("image", "label"), can=("encode_image", "classify"), official="yann.lecun.com/exdb/lenet",
)

PARAMETERS = 60_000

# Which maps of S2 each map of C3 reads (table I).
TABLE = (*(tuple((i + k) % 6 for k in range(3)) for i in range(6)), *(tuple((i + k) % 6 for k in range(4)) for i in range(6)),
         (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), tuple(range(6)))

# The ten digits in 12 rows of 7 pixels, one hexadecimal pair a row.
CODES = ("1c2241414141414141221c00", "080c0a0808080808083e0000", "1e2140402010080402017f00", "3e4140403c40404041413e00", "20302824222121217f202000",
         "7f01011f2040404041221c00", "3c0201011d23414141221c00", "7f4140202010100808080800", "1c2241221c22414141221c00", "1c22414162dc404020100e00")
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


class Codes(Part):
    """-y_i = -sum_j (x_j - w_ij)^2, the w_ij fixed: +1 where the picture of class i has ink, else -1. x [...,84] -> [...,10]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codes: tuple[str, ...] = CODES       # twelve rows of seven pixels, two hexadecimal digits a row

    code: Tensor

    def __init__(self, c: Config):
        super().__init__()
        rows = [[int(code[k:k + 2], 16) >> bit & 1 for k in range(0, 24, 2) for bit in range(7)] for code in c.codes]
        self.register_buffer("code", torch.tensor(rows, dtype=torch.float32) * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        return -(x[..., None, :] - self.code).square().sum(-1)


@final
class LeNet5(Classifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        j: float = 0.1                       # how far from every code a picture of nothing is

    def __init__(self, c: Config):
        super().__init__(c)
        self.j = c.j

    def losses(self, batch: Batch) -> Losses:
        """Equation 9: the distance to the right code, and how near the nearest codes are."""
        y = -self.classify(batch["image"])
        right = y.gather(1, batch["label"][:, None])[:, 0]
        rest = torch.cat([y.new_full((len(y), 1), -self.j), -y], 1).logsumexp(1)
        return Losses(map=(right + rest).mean())

    def plain_losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"]))


# Paper is -0.1 and ink 1.175, so that the mean is about 0 and the variance about 1 (section II-B).
SCALED = ImagePlan(size=28, mean=(0.1 / 1.275,) * 3, std=(1 / 1.275,) * 3)


def tiny() -> Preset:
    return Preset(
        data="digits", config=LeNet5.Config(backbone=Net1998.Config(), head=Codes.Config()),
        feed=Feed(image=SCALED, train_image=ViewPlan(size=28, scale=(1.0, 1.0), ratio=(1.0, 1.0))),
        stages=(Stage(objective=LeNet5.losses, steps=300, batch_size=32, optim=Optim(name="sgd", lr=2e-3, momentum=0.9, warmup=20, clip=20.0)),))


def plain_tower(size: int = 28) -> ConvNet.Config:
    """28 pixels with a padding of 2 or 32 without: the same 16 maps of 5x5."""
    rows = (Row.Config(out=6, kernel=5, padding=(32 - size) // 2, pool=Pool.Config()), Row.Config(out=16, kernel=5, padding=0, pool=Pool.Config()))
    return ConvNet.Config(rows=rows, grid=5, hidden=(120, 84), front=Grey.Config(), init=PlainInit.Config(std=None))


def plain() -> Preset:
    return tiny().but(
        config=LeNet5.Config(backbone=plain_tower(), head=LinearBias.Config(into=84, out=10)),
        stages=(Stage(objective=LeNet5.plain_losses, steps=300, batch_size=32, optim=Optim(name="sgd", lr=0.01, momentum=0.9, warmup=20)),))


RATES = ((2, 5e-4), (3, 2e-4), (3, 1e-4), (4, 5e-5), (8, 1e-5))          # passes over the pictures, and the rate of each


def paper() -> Preset:
    """Twenty passes over MNIST, one picture at a time, at the published rates (section III-C; what its second derivatives do to them is left out)."""
    return tiny().but(data="mnist", stages=tuple(Stage(
        name=f"rate_{k}", objective=LeNet5.losses, steps=passes * 60_000, batch_size=1,
        optim=Optim(name="sgd", lr=rate, momentum=0.0, schedule="constant")) for k, (passes, rate) in enumerate(RATES, 1)))
