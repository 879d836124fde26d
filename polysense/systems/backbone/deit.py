"""DeiT: a transformer learns to see from ImageNet alone, with a convolutional teacher looking over its shoulder.

A second learned token stands beside the class token, with a position of its own; it goes through the same blocks and ends in its own dense head,
which is to say what a frozen convolutional teacher says about the same augmented picture:

    hard    L = 1/2 CE(f_cls, y) + 1/2 CE(f_dist, argmax teacher(x))                                     (equation 3)
    soft    L = (1 - l) CE(f_cls, y) + l t^2 KL(softmax(teacher / t) || softmax(f_dist / t))             (equation 2)

Mixed and smoothed labels belong to the first term only. In testing the two logits are averaged, as in the authors' code (the paper adds their
softmax). What makes it work on so few pictures is the augmentation: RandAugment, erasing, Mixup or CutMix, stochastic depth, and each picture
three times a batch in three versions (`views`).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import AugmentPlan, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, System, ViewPlan, final
from polysense.mechanisms.mixing import Mixing
from polysense.mechanisms.teacher import Teacher
from polysense.nn.block import PreNorm
from polysense.nn.head import LinearBias
from polysense.nn.init import NormalInit
from polysense.nn.norm import LayerNorm
from polysense.nn.residual import CIFAR_STEM, Basic, Bottleneck, Pad
from polysense.nn.transformer import Transformer
from polysense.objectives.classify import softmax_ce
from polysense.objectives.distil import hard_distillation, soft_distillation
from polysense.towers.headed import Headed
from polysense.towers.resnet import ResNet
from polysense.towers.vit import ViT
from polysense.weights import deit_hf, deit_timm

card = Card(
    name="DeiT", paper="Touvron et al., Training data-efficient image transformers & distillation through attention, ICML 2021",
    arxiv="2012.12877", year=2021, says="Sorts pictures into classes with a transformer that a convolutional teacher helped through an extra token.",
    needs=("views", "label"), can=("encode_image", "classify"), official="facebookresearch/deit",
)

PARAMETERS = 87_338_192                      # DeiT-B with both heads, without its teacher

weights = {"timm": deit_timm.LAYOUT, "hf": deit_hf.LAYOUT}


@final
class DeiT(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: ViT.Config
        head: LinearBias.Config
        mix: Mixing.Config
        teacher: Headed.Config | None = None     # None: a trained student, without what taught it
        smoothing: float = 0.1                       # of the true label
        share: float = 0.1                           # l of soft distillation
        temperature: float = 3.0
        divisor: str = "number"                      # what the sum of soft distillation is divided by: batch times classes, or "batch"

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.head, self.head_distilled = c.vision.build(), c.head.build(), c.head.build()
        self.teacher = Teacher.Config(mode="eval").of(c.teacher.build()).eval() if c.teacher is not None else None     # all buffers
        self.mix, self.c = c.mix.build(), c

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W] -> logits of the class token and of the distillation token, [B,C] each."""
        tokens = self.vision(image).tokens
        return self.head(tokens[:, 0]).float(), self.head_distilled(tokens[:, 1]).float()

    def taught(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The versions of all pictures, mixed: both logits, the mixed labels, and what the teacher says about the very same."""
        if self.teacher is None:
            raise UserError("this DeiT has no teacher", "set config.teacher and a start that fills it, or train with the objective DeiT.alone")
        image, target = self.mix(batch["views"].flatten(0, 1), batch["label"].repeat_interleave(batch["views"].shape[1]))
        return *self.both(image), target, self.teacher(image)

    def losses(self, batch: Batch) -> Losses:
        """Hard distillation."""
        one, two, target, teacher = self.taught(batch)
        return Losses(label=softmax_ce(one, target, self.c.smoothing) / 2, distil=hard_distillation(two, teacher) / 2)

    def soft_losses(self, batch: Batch) -> Losses:
        one, two, target, teacher = self.taught(batch)
        soft = soft_distillation(two, teacher, self.c.temperature, self.c.divisor)
        return Losses(label=softmax_ce(one, target, self.c.smoothing) * (1 - self.c.share), distil=soft * self.c.share)

    def alone(self, batch: Batch) -> Losses:
        """Without a teacher: both heads learn the label. The control."""
        image, target = self.mix(batch["views"].flatten(0, 1), batch["label"].repeat_interleave(batch["views"].shape[1]))
        one, two = (softmax_ce(x, target, self.c.smoothing) / 2 for x in self.both(image))
        return Losses(label=one, second=two)

    def classify(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> logits [B,C], the mean of both heads."""
        return torch.stack(self.both(image)).mean(0)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of both tokens."""
        return F.normalize(self.vision(image).tokens[:, :2].mean(1).float(), dim=-1)


def tower(size: int, patch: int, width: int, depth: int, heads: int, drop_path: float = 0.1, eps: float = 1e-6) -> ViT.Config:
    norm = LayerNorm.Config(eps=eps)
    return ViT.Config(image_size=size, patch=patch, prefix=2, body=Transformer.Config(
        width=width, depth=depth, heads=heads, norm=norm, drop_path=drop_path, init=NormalInit.Config(), block=PreNorm.Config(norm=norm)))


def system(vision: ViT.Config, classes: int, teacher: ResNet.Config, mix: tuple[float, float]) -> DeiT.Config:
    return DeiT.Config(vision=vision, head=LinearBias.Config(into=vision.width, out=classes, std=0.02),
                       mix=Mixing.Config(classes=classes, mixup=mix[0], cutmix=mix[1]),
                       teacher=Headed.Config(backbone=teacher, head=LinearBias.Config(into=teacher.width, out=classes)))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERSIONS = 3                                 # of each picture in a batch


def tiny() -> Preset:
    """The teacher is the tiny ResNet of this house."""
    teacher = ResNet.Config(layers=(3, 3, 3), base=8, stem=CIFAR_STEM, block=Basic.Config(shortcut=Pad.Config()))
    view = ViewPlan(size=28, scale=(0.7, 1.0))
    return Preset(
        data="digits", config=system(tower(28, 4, 96, 4, 3), 10, teacher, (0.0, 0.0)),
        starts=(Start(into="teacher.module", from_="resnet"),), feed=Feed(image=ImagePlan(size=28, mean=MEAN, std=STD), views=(view,) * VERSIONS),
        stages=(Stage(objective=DeiT.losses, steps=300, batch_size=24, optim=Optim(lr=1e-3, weight_decay=0.05, warmup=30, clip=1.0)),))


def soft() -> Preset:
    """`tiny` by soft distillation."""
    return tiny().but(**{"stages.0.objective": DeiT.soft_losses})


def paper() -> Preset:
    """DeiT-B (table 9): 300 epochs of batch 1024, of which each picture fills three places. The teacher, a RegNetY-16GF there, is a ResNet-50."""
    views = (AugmentPlan(size=224, scale=(0.08, 1.0), flip=0.5, operations=2, magnitude=9.0, vary=0.5, erase=0.25),) * VERSIONS
    teacher, epoch = ResNet.Config(layers=(3, 4, 6, 3), block=Bottleneck.Config(stride_in="3x3")), 1_281_167 // 1024
    return Preset(
        data="imagenet1k", config=system(tower(224, 16, 768, 12, 12), 1000, teacher, (0.8, 1.0)),
        starts=(Start(into="teacher.module", from_="resnet", preset="resnet50"),),
        feed=Feed(image=ImagePlan(size=224, mean=MEAN, std=STD), views=views),
        stages=(Stage(objective=DeiT.losses, steps=300 * epoch, batch_size=1024 // VERSIONS, ema=0.99996, optim=Optim(
            lr=5e-4 * 1024 / 512, weight_decay=0.05, warmup=5 * epoch)),))


def deit_tiny() -> Preset:
    """DeiT-Ti: 192 wide, 3 heads."""
    base = paper()
    return base.but(config=system(tower(224, 16, 192, 12, 3), 1000, base.config.teacher.backbone, (0.8, 1.0)))  # type: ignore[attr-defined]
