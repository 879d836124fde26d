"""Label-supervised pre-training, and what is done with it afterwards.

Pre-training is softmax cross-entropy over one label (`losses`) or sigmoid cross-entropy over many (`tag_losses`). Transfer swaps the head:

    fine-tune      new head that starts at zero, every weight trains, lr_l = lr * decay^(L-l) along the depth       (`finetune`)
    linear probe   only the head trains, on frozen features            (`polysense exam RUN linear_probe`, or `linear` by SGD)
    k-NN, few-shot cosine votes, ridge regression in closed form       (`polysense exam RUN knn_probe`, `few_shot`)

The paper's configuration is BiT-M (Kolesnikov et al.): a pre-activation ResNet with group norm and standardised weights, which transfers by
SGD whatever the batch size, with one rule for all tasks (`transfer`, `transfer_medium`, `transfer_large`: 500, 10,000 or 20,000 steps).
"""
from collections.abc import Callable
from dataclasses import dataclass

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, SidesPlan, Spec, Stage, Start, ViewPlan, final
from polysense.nn.head import LinearBias
from polysense.nn.residual import Basic, Stem
from polysense.objectives.classify import mixup, sigmoid_ce, softmax_ce
from polysense.towers.bit import Bit
from polysense.towers.resnet import ResNet
from polysense.weights import bit

card = Card(
    name="Supervised pre-training", paper="Kolesnikov et al., Big Transfer (BiT): General Visual Representation Learning, ECCV 2020",
    arxiv="1912.11370", year=2020, says="Pre-trains any image tower on labels, then carries it to a small task: fine-tune, probe, k-NN, few-shot.",
    needs=("image", "label|tags"), can=("encode_image", "classify"), official="google-research/big_transfer",
)

weights = {"timm": bit.TIMM_LAYOUT, "hf": bit.HF_LAYOUT}

PARAMETERS = 516_018_323                     # BiT-M R101x3 with its 21,843-class head


@final
class Supervised(Classifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        smoothing: float = 0.0               # of the single label

    def __init__(self, c: Config):
        super().__init__(c)
        self.smoothing = c.smoothing

    def losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"], self.smoothing))

    def mixed_losses(self, batch: Batch) -> Losses:
        """Of mixtures of two pictures each (mixup; BiT-HyperRule, section 3.3, for all but small tasks)."""
        image, target = mixup(batch["image"], batch["label"], self.head.out_features, MIXED)  # type: ignore[arg-type]
        return Losses(label=softmax_ce(self.classify(image), target, self.smoothing))

    def tag_losses(self, batch: Batch) -> Losses:
        return Losses(tags=sigmoid_ce(self.classify(batch["image"]), batch["tags"]))


HALF = (0.5, 0.5, 0.5)
MIXED = 0.1                                  # alpha


def tower() -> ResNet.Config:
    """The image tower that `tiny` pre-trains and that `lit` locks."""
    return ResNet.Config(layers=(1, 1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())


def tiny() -> Preset:
    return Preset(
        data="scenes:combos", config=Supervised.Config(backbone=tower(), head=LinearBias.Config(into=192, out=256)),
        feed=Feed(image=ImagePlan(size=64, mean=HALF, std=HALF), train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5)),
        stages=(Stage(objective=Supervised.losses, steps=400, batch_size=128, optim=Optim(lr=2e-3, weight_decay=0.05, warmup=40, clip=1.0)),))


def finetune() -> Preset:
    """Carry `tiny` to another set of labels: new zero head, every weight, lower layers slower."""
    return tiny().but(
        data="digits", starts=(Start(into="backbone", from_="supervised", take="backbone"),),
        config=Supervised.Config(backbone=tower(), head=LinearBias.Config(into=192, out=10, std=0.0)),
        stages=(Stage(objective=Supervised.losses, steps=150, batch_size=64,
                      optim=Optim(lr=1e-3, weight_decay=0.05, warmup=15, layer_decay=0.75, clip=1.0)),))


def linear() -> Preset:
    """Carry `tiny` to another set of labels by its head alone; the tower is frozen, in eval mode, and sees no gradient."""
    return finetune().but(stages=(Stage(objective=Supervised.losses, trainable=("head.*",), steps=150, batch_size=64,
                                        optim=Optim(name="sgd", lr=0.5, warmup=15)),))


def paper() -> Preset:
    """BiT-M R101x3 on ImageNet-21k (section 3.3): 90 epochs of batch 4096, SGD lr 0.03 for each 256 pictures, tenfold drops."""
    tower: Spec = Bit.Config(layers=(3, 4, 23, 3), base=3 * 64)
    epoch = 14_197_122 // 4096
    return Preset(
        data="imagenet21k", config=Supervised.Config(backbone=tower, head=LinearBias.Config(into=6144, out=21_843, std=0.0)),
        feed=Feed(image=ImagePlan(size=224, mean=HALF, std=HALF), train_image=ViewPlan(size=224, scale=(0.05, 1.0), flip=0.5)),
        stages=(Stage(objective=Supervised.losses, steps=90 * epoch, batch_size=4096, optim=Optim(
            name="sgd", lr=0.03 * 4096 / 256, momentum=0.9, weight_decay=1e-4, warmup=5000, schedule="step",
            milestones=(30 / 90, 60 / 90, 80 / 90))),))


def _rule(data: str, classes: int, steps: int, size: int, sides: int, objective: Callable[..., Losses]) -> Preset:
    """BiT-HyperRule (section 3.3): SGD at 0.003, batch 512, no weight decay, tenfold drops; what changes with the task is how long and how large."""
    base = paper()
    return base.but(
        data=data, starts=(Start(into="backbone", from_="supervised", take="backbone", preset="paper"),),
        config=base.config.but(head=LinearBias.Config(into=6144, out=classes, std=0.0)),
        feed=Feed(image=ImagePlan(size=size, fit="squash", resample="bilinear", mean=HALF, std=HALF),
                  train_image=SidesPlan(size=size, sides=(sides, sides), flip=0.5)),
        stages=(Stage(objective=objective, steps=steps, batch_size=512, optim=Optim(
            name="sgd", lr=0.003, momentum=0.9, schedule="step", milestones=(0.3, 0.6, 0.9))),))


def transfer() -> Preset:
    """Fewer than 20,000 labelled pictures, such as Oxford's pets: 500 steps, nothing mixed."""
    return _rule("oxford_pets", 37, 500, 384, 448, Supervised.losses)


def transfer_medium() -> Preset:
    """Fewer than 500,000, such as CIFAR-10, whose small pictures are read at 128 pixels: 10,000 steps."""
    return _rule("cifar10", 10, 10_000, 128, 160, Supervised.mixed_losses)


def transfer_large() -> Preset:
    """More: 20,000 steps."""
    return _rule("imagenet1k", 1000, 20_000, 384, 448, Supervised.mixed_losses)
