"""ResNet: layers learn what to add to their input.

    y = ReLU(F(x) + shortcut(x)),   F = conv-BN-ReLU-conv-BN  or  1x1-3x3-1x1 with four times the channels      (equations 1 and 2)

The shortcut is the identity except where the shape changes. Without shortcuts the same layers make the plain net of the paper, which gets
harder to train as it gets deeper; `plain()` is that control. Published weights come with the stride of a bottleneck in its first 1x1 (the
paper) or in its 3x3 (torchvision, timm): `stride_in` says which.
"""
from dataclasses import dataclass

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, SidesPlan, Spec, Stage, ViewPlan, final
from polysense.nn.head import LinearBias
from polysense.nn.residual import CIFAR_STEM, Basic, Bottleneck, Pad
from polysense.objectives.classify import softmax_ce
from polysense.towers.resnet import ResNet
from polysense.weights import resnet_hf, resnet_timm

card = Card(
    name="ResNet", paper="He et al., Deep Residual Learning for Image Recognition, CVPR 2016",
    arxiv="1512.03385", year=2016, says="Sorts pictures into classes with a deep residual network, with the plain network as its control.",
    needs=("image", "label"), can=("encode_image", "classify"), official="KaimingHe/deep-residual-networks",
)

PARAMETERS = 25_557_032                      # ResNet-50

weights = {"timm": resnet_timm.LAYOUT, "hf": resnet_hf.LAYOUT}


@final
class ResidualNetwork(Classifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"]))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cifar_form(depth: int, base: int = 16, classes: int = 10, shortcut: Spec | None = None) -> ResidualNetwork.Config:
    """The 6n+2-layer nets of section 4.2: 3x3 stem, three stages of basic blocks. `shortcut=None` makes the plain net."""
    tower = ResNet.Config(layers=((depth - 2) // 6,) * 3, base=base, stem=CIFAR_STEM, block=Basic.Config(shortcut=shortcut))
    return ResidualNetwork.Config(backbone=tower, head=LinearBias.Config(into=tower.width, out=classes))


def tiny() -> Preset:
    return Preset(
        data="digits", config=cifar_form(20, base=8, shortcut=Pad.Config()),
        feed=Feed(image=ImagePlan(size=28, mean=MEAN, std=STD), train_image=ViewPlan(size=28, scale=(0.7, 1.0))),
        stages=(Stage(objective=ResidualNetwork.losses, steps=300, batch_size=128,
                      optim=Optim(name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, warmup=20)),))


def plain() -> Preset:
    """`tiny` without its shortcuts."""
    return tiny().but(config=cifar_form(20, base=8))


def _imagenet(tower: ResNet.Config) -> Preset:
    epoch = 1_281_167 // 256
    return Preset(
        data="imagenet1k", config=ResidualNetwork.Config(backbone=tower, head=LinearBias.Config(into=tower.width, out=1000)),
        feed=Feed(image=ImagePlan(size=224, mean=MEAN, std=STD), train_image=ViewPlan(size=224, scale=(0.2, 1.0), flip=0.5)),
        stages=(Stage(objective=ResidualNetwork.losses, steps=600_000, batch_size=256, optim=Optim(
            name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="step", milestones=(30 * epoch / 600_000, 60 * epoch / 600_000))),))


def paper() -> Preset:
    """ResNet-50 as in table 1: stride in the first 1x1 of a stage, the shorter side drawn from 256 to 480; ten crops in tests (`ten_crops`)."""
    made = _imagenet(ResNet.Config(layers=(3, 4, 6, 3), block=Bottleneck.Config(stride_in="1x1")))
    return made.but(**{"feed.train_image": SidesPlan(size=224, sides=(256, 480), flip=0.5, lighting=0.1)})


def resnet50() -> Preset:
    """ResNet-50 as torchvision and timm have it ("v1.5"): stride in the 3x3."""
    return _imagenet(ResNet.Config(layers=(3, 4, 6, 3), block=Bottleneck.Config(stride_in="3x3")))


def resnet152() -> Preset:
    """The deepest of table 1, stride in the 3x3."""
    return _imagenet(ResNet.Config(layers=(3, 8, 36, 3), block=Bottleneck.Config(stride_in="3x3")))


def resnet18() -> Preset:
    return _imagenet(ResNet.Config(layers=(2, 2, 2, 2), block=Basic.Config()))
