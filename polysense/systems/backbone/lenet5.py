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
from torch import Tensor

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Part, Preset, Spec, Stage, ViewPlan, final
from polysense.nn.head import LinearBias
from polysense.objectives.classify import softmax_ce
from polysense.towers.convnet import ConvNet, PlainInit, Pool, Row
from polysense.towers.lenet import Grey, Net1998

card = Card(
    name="LeNet-5", paper="LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proceedings of the IEEE 1998", year=1998,
    says="Sorts small grey pictures such as handwritten digits into ten classes with seven layers.",
    needs=("image", "label"), can=("encode_image", "classify"), official="yann.lecun.com/exdb/lenet",
)

PARAMETERS = 60_000

# The ten digits in 12 rows of 7 pixels, one hexadecimal pair a row.
CODES = ("1c2241414141414141221c00", "080c0a0808080808083e0000", "1e2140402010080402017f00", "3e4140403c40404041413e00", "20302824222121217f202000",
         "7f01011f2040404041221c00", "3c0201011d23414141221c00", "7f4140202010100808080800", "1c2241221c22414141221c00", "1c22414162dc404020100e00")


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
