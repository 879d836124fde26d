"""NFNet: a residual network that needs no batch normalisation.

    h' = shortcut(h) + alpha * g * f(beta * act(h)),   beta = 1 / sqrt(expected variance of h),   alpha = 0.2       (section 2)

The variance of h is known without looking at data: 1 behind a transition block, plus alpha^2 a block. Filters are standardised by their fan in,
activations scaled to pass on variance 1, squeeze-excite gates doubled, and the scalar g (SkipInit) starts at 0. What batch norm did for large
batches and rates is done by adaptive gradient clipping (AGC): the gradient of a unit, a row of a weight, may be at most lambda times as long as
the unit,

    G_i <- lambda * max(|W_i|, 1e-3) / |G_i| * G_i    where |G_i| / max(|W_i|, 1e-3) > lambda                        (equation 3)

everywhere but in the last dense layer (`AdaptiveClip`). F6 is the vision encoder of Flamingo.
"""
from dataclasses import dataclass

from polysense.archetypes.classifier import MixedClassifier
from polysense.base.card import Card
from polysense.base.system import AdaptiveClip, AugmentPlan, Feed, ImagePlan, Preset, Stage, ViewPlan, final
from polysense.mechanisms.mixing import Mixing
from polysense.nn.head import LinearBias
from polysense.towers.nfnet import NFNet, NormFree
from polysense.weights import nfnet_timm

card = Card(
    name="NFNet", paper="Brock et al., High-Performance Large-Scale Image Recognition Without Normalization, ICML 2021",
    arxiv="2102.06171", year=2021, says="Sorts pictures into classes with a residual network without batch normalisation; Flamingo's vision encoder.",
    needs=("image", "label"), can=("encode_image", "classify"), official="google-deepmind/deepmind-research/nfnets",
)

PARAMETERS = 438_359_116                     # F6

weights = {"timm": nfnet_timm.LAYOUT}


@final
class NormaliserFree(MixedClassifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(MixedClassifier.Config):
        smoothing: float = 0.1


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def net(tower: NFNet.Config, classes: int, mix: tuple[float, float] = (0.0, 0.0), smoothing: float = 0.1) -> NormaliserFree.Config:
    return NormaliserFree.Config(backbone=tower, head=LinearBias.Config(into=tower.last, out=classes), smoothing=smoothing,
                                 mix=Mixing.Config(classes=classes, mixup=mix[0], cutmix=mix[1]))


def tower(k: int, drop_path: float = 0.25, dropout: float = 0.5) -> NFNet.Config:
    """F_k (table 1)."""
    return NFNet.Config(layers=(k + 1, 2 * (k + 1), 6 * (k + 1), 3 * (k + 1)), drop_path=drop_path, dropout=dropout)


def tiny() -> Preset:
    """An F of depths 1 2 2 1 for pictures of 32 pixels, which the stem halves once."""
    small = NFNet.Config(layers=(1, 2, 2, 1), widths=(32, 64, 96, 96), stem=(8, 8, 16, 16), stem_strides=(2, 1, 1, 1), last=192,
                         block=NormFree.Config(group=16))
    return Preset(
        data="digits", config=net(small, 10),
        feed=Feed(image=ImagePlan(size=32, mean=MEAN, std=STD), train_image=ViewPlan(size=32, scale=(0.8, 1.0))),
        stages=(Stage(objective=NormaliserFree.losses, steps=200, batch_size=128, optim=AdaptiveClip(
            name="nesterov", lr=0.1, momentum=0.9, weight_decay=2e-5, warmup=20, unit_clip=0.01)),))


def paper() -> Preset:
    """F6 (sections 4.2 and 5, appendix A): batch 4096 for 360 epochs, lambda 0.01."""
    epoch = 1_281_167 // 4096
    return Preset(
        data="imagenet1k", config=net(tower(6), 1000, mix=(0.2, 1.0)),
        feed=Feed(image=ImagePlan(size=576, fit="squash", mean=MEAN, std=STD),
                  train_image=AugmentPlan(size=448, scale=(0.08, 1.0), flip=0.5, operations=4, magnitude=10.0)),
        stages=(Stage(objective=NormaliserFree.losses, steps=360 * epoch, batch_size=4096, ema=0.99999, optim=AdaptiveClip(
            name="nesterov", lr=0.1 * 4096 / 256, momentum=0.9, weight_decay=2e-5, warmup=5 * epoch)),))


def f0() -> Preset:
    """The smallest: 192 px in training, 256 in tests."""
    return paper().but(config=net(tower(0, drop_path=0.2, dropout=0.2), 1000, mix=(0.2, 1.0))).but(
        **{"feed.image.size": 256, "feed.train_image.size": 192, "feed.train_image.magnitude": 5.0})
