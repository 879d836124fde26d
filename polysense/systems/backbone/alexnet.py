"""AlexNet: eight layers, rectified, dropped out, and pictures that are never twice the same.

    conv1 96@11x11/4 ReLU LRN pool   conv2 256@5x5 ReLU LRN pool   conv3 384   conv4 384   conv5 256 pool   FC4096 FC4096 FC

    LRN: b = a / (2 + 1e-4 sum over 5 neighbouring channels of a^2)^0.75, behind the ReLU        (section 3.3)

Pools are 3x3 with stride 2: they overlap. conv2, conv4 and conv5 read only the half of the channels that lay on their GPU (two groups). Dropout
stands before the first two dense layers. Training cuts 224 of 256 pixels, mirrors, and adds noise along the principal components of colour;
testing averages the softmax over ten crops (`ten_crops`). Pixels are read as values up to 255 less their mean: inhibition by 1e-4 of the squares and
biases of 1 are meant for answers of that size. `torchvision` is another network, of one tower without LRN, whose weights are published.
"""
from dataclasses import dataclass

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, SidesPlan, Stage, ViewPlan, final
from polysense.nn.head import LinearBias
from polysense.nn.norm import ResponseNorm
from polysense.objectives.classify import softmax_ce
from polysense.towers.convnet import ConvNet, PlainInit, Pool, Row
from polysense.weights import convnet_torchvision

card = Card(
    name="AlexNet", paper="Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NeurIPS 2012", year=2012,
    says="Sorts pictures into classes with the eight-layer convolutional network that began deep learning on photographs.",
    needs=("image", "label"), can=("encode_image", "classify"), official="code.google.com/archive/p/cuda-convnet",
)

PARAMETERS = 60_965_224

weights = {"torchvision": convnet_torchvision.ALEXNET}

OVERLAPPING = Pool.Config(side=3, stride=2)
LIT = ("stages.1.0.conv", "stages.2.1.conv", "stages.2.2.conv", "hidden.0", "hidden.1")      # their biases start at 1: a ReLU must hear something


@final
class AlexNet(Classifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"]))


MEAN, STD, BYTE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (1 / 255,) * 3


def net(widths: tuple[int, ...], first: Row.Config, *, groups: int = 2, grid: int = 6, hidden: int = 4096, classes: int = 1000, std: float = 0.01,
        norm: ResponseNorm.Config | None = None, pool: Pool.Config = OVERLAPPING, lit: tuple[str, ...] = LIT) -> AlexNet.Config:
    """The five convolutions and three dense layers; `first` says kernel and stride of conv1."""
    one, two, three, four, five = widths
    rows = (first.but(out=one, norm=norm, pool=pool), Row.Config(out=two, kernel=5, groups=groups, norm=norm, pool=pool), Row.Config(out=three),
            Row.Config(out=four, groups=groups), Row.Config(out=five, groups=groups, pool=pool))
    tower = ConvNet.Config(rows=rows, grid=grid, hidden=(hidden, hidden), dropout=0.5, drop="before", init=PlainInit.Config(std=std, ones=lit))
    return AlexNet.Config(backbone=tower, head=LinearBias.Config(into=hidden, out=classes))


SMALL = Row.Config(out=24, kernel=5)


def tiny() -> Preset:
    """Narrow, for pictures of 28 pixels. At this width biases of 1 and dropout together drown what differs between pictures: so biases start at 0,
    the dense layers are wide beside the maps, weights start larger (each unit sums over fewer others), and Adam takes the place of momentum."""
    return Preset(
        data="digits", config=net((24, 64, 96, 96, 64), SMALL, grid=2, hidden=512, classes=10, std=0.09, norm=ResponseNorm.Config(), lit=()),
        feed=Feed(image=ImagePlan(size=28, mean=(0.3,) * 3, std=(0.38,) * 3), train_image=SidesPlan(size=28, sides=(32, 32), lighting=0.1)),
        stages=(Stage(objective=AlexNet.losses, steps=400, batch_size=32, optim=Optim(
            name="adamw", lr=1e-3, weight_decay=5e-4, warmup=20, clip=5.0)),))


def paper() -> Preset:
    """ImageNet-1k: 90 epochs of batch 128, tenfold drops of the rate (section 5)."""
    epochs, epoch = 90, 1_281_167 // 128
    return Preset(
        data="imagenet1k", config=net((96, 256, 384, 384, 256), Row.Config(out=96, kernel=11, stride=4, padding=2), norm=ResponseNorm.Config()),
        feed=Feed(image=ImagePlan(size=224, resample="bilinear", mean=MEAN, std=BYTE),
                  train_image=SidesPlan(size=224, sides=(256, 256), flip=0.5, lighting=0.1)),
        stages=(Stage(objective=AlexNet.losses, steps=epochs * epoch, batch_size=128, optim=Optim(
            name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(0.35, 0.65, 0.9))),))


def torchvision() -> Preset:
    """The one-tower form of Krizhevsky 2014 ("one weird trick") that torchvision publishes: narrower, no LRN, no groups."""
    return paper().but(config=net((64, 192, 384, 256, 256), Row.Config(out=64, kernel=11, stride=4, padding=2), groups=1)).but(
        **{"feed.image.std": STD, "feed.train_image": ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5)})
