"""VGG: depth, out of nothing but 3x3 convolutions.

Three 3x3 convolutions see 7x7 pixels with fewer weights and more nonlinearities than one 7x7. Widths 64 128 256 512 512, doubled behind each
2x2 max pool; ReLU; no normalisation; three dense layers, dropout behind the first two.

    configuration   convolutions a stage
    A               1 1 2 2 2             trains from N(0, 0.01)
    D (VGG-16)      2 2 3 3 3             its first four convolutions and the dense layers start from A, the rest from N(0, 0.01)
    E (VGG-19)      2 2 4 4 4             as D

`glorot` is what the authors later found enough in place of the start from A. In testing, the dense layers become convolutions over the whole
picture, and the class map is averaged over places and with that of the mirrored picture (`classify_densely`). `vision.features` of the tower
are the maps that perceptual distances compare.
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, SidesPlan, Stage, Start, ViewPlan, final
from polysense.nn.head import LinearBias
from polysense.objectives.classify import softmax_ce
from polysense.towers.convnet import ConvNet, PlainInit, Pool, Row
from polysense.weights import convnet_timm, convnet_torchvision

card = Card(
    name="VGG", paper="Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015",
    arxiv="1409.1556", year=2015, says="Sorts pictures into classes with a deep stack of 3x3 convolutions; its maps serve perceptual distances.",
    needs=("image", "label"), can=("encode_image", "classify"), official="robots.ox.ac.uk/~vgg/research/very_deep",
)

PARAMETERS = 138_357_544                     # D

CONVS = {"A": (1, 1, 2, 2, 2), "D": (2, 2, 3, 3, 3), "E": (2, 2, 4, 4, 4)}

weights = {"torchvision": convnet_torchvision.VGG, "timm": convnet_timm.LAYOUT}


@final
class VGG(Classifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"]))

    def class_map(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> logits of every window that the dense layers read, [B,h,w,C]. At the size of training h = w = 1."""
        return self.head(self.backbone.dense(image)).float()

    def classify_densely(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> class probabilities [B,C] of the whole picture and its mirror image (section 3.2)."""
        one, two = (self.class_map(x).mean((1, 2)).softmax(-1) for x in (image, image.flip(-1)))
        return (one + two) / 2


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def net(kind: str, *, classes: int, base: int = 64, grid: int = 7, hidden: int = 4096, std: float | None = 0.01) -> VGG.Config:
    """The network of table 1. Narrow ones need a larger `std`: each unit sums over fewer others."""
    rows = tuple(Row.Config(out=base * min(2 ** s, 8), pool=Pool.Config() if k == n - 1 else None)
                 for s, n in enumerate(CONVS[kind]) for k in range(n))
    tower = ConvNet.Config(rows=rows, grid=grid, hidden=(hidden, hidden), dropout=0.5, init=PlainInit.Config(std=std))
    return VGG.Config(backbone=tower, head=LinearBias.Config(into=hidden, out=classes, std=hidden ** -0.5 if std is None else std))


FROM_A = (("backbone", "backbone"), ("head", "head"))


def tiny() -> Preset:
    """A, an eighth as wide, for pictures of 32 pixels."""
    return Preset(
        data="digits", config=net("A", classes=10, base=8, grid=1, hidden=64, std=0.1),
        feed=Feed(image=ImagePlan(size=32, mean=MEAN, std=STD), train_image=ViewPlan(size=32, scale=(0.8, 1.0))),
        stages=(Stage(objective=VGG.losses, steps=300, batch_size=64, optim=Optim(
            name="sgd", lr=0.02, momentum=0.9, weight_decay=5e-4, warmup=20, clip=1.0)),))


def deeper() -> Preset:
    """D at the size of `tiny`, which lends it its first layers and its dense ones."""
    return tiny().but(config=net("D", classes=10, base=8, grid=1, hidden=64, std=0.1),
                      starts=tuple(Start(into=into, from_="vgg", take=take) for into, take in FROM_A))


def _imagenet(config: VGG.Config, starts: tuple[Start, ...] = ()) -> Preset:
    epochs, epoch = 74, 1_281_167 // 256
    return Preset(
        data="imagenet1k", config=config, starts=starts,
        feed=Feed(image=ImagePlan(size=224, resample="bilinear", mean=MEAN, std=STD),
                  train_image=SidesPlan(size=224, sides=(256, 512), flip=0.5, lighting=0.1)),
        stages=(Stage(objective=VGG.losses, steps=epochs * epoch, batch_size=256, optim=Optim(
            name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(0.4, 0.65, 0.85))),))


def paper_a() -> Preset:
    return _imagenet(net("A", classes=1000))


def paper() -> Preset:
    """D, VGG-16."""
    return _imagenet(net("D", classes=1000), tuple(Start(into=into, from_="vgg", take=take, preset="paper_a") for into, take in FROM_A))


def vgg19() -> Preset:
    """E, VGG-19."""
    return paper().but(config=net("E", classes=1000))


def glorot() -> Preset:
    """D at once, from Glorot's initialisation."""
    return _imagenet(net("D", classes=1000, std=None))
