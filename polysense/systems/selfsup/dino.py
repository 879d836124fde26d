"""DINO: a student learns to say of every crop of a picture what its own slowly moving average says of the large ones.

    P_s = softmax(g_s / tau_s),   P_t = softmax((g_t - c) / tau_t)                                                (equation 1 and section 3.1)
    L = mean over teacher crops i and student crops j != i of H(P_t(x_i), P_s(x_j))                               (equation 3)

The teacher sees the two large crops, the student sees all. The teacher's parameters are a moving average of the student's, momentum 0.996 to 1 on a
cosine. Two opposite forces prevent collapse: the centre c, a running mean of the teacher's outputs (updated after the loss), works against one
dimension winning everywhere; the low temperature tau_t, warmed from 0.04 to 0.07, against the uniform answer. For the first epoch the last layer
of the head is held still. After training the head is thrown away and the teacher's backbone is used; where the class token of its last block
looks outlines the objects of a picture.
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polysense.archetypes.self_distilled import answers
from polysense.archetypes.twin_views import TwinViews
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import CropFeed, RisingDecay
from polysense.base.system import After, Batch, ImagePlan, Losses, Preset, Spec, Stage, ViewPlan, final
from polysense.mechanisms.centre import Centre
from polysense.mechanisms.sinkhorn import Sinkhorn
from polysense.mechanisms.teacher import Teacher
from polysense.nn.block import PreNorm
from polysense.nn.head import Nothing
from polysense.nn.norm import LayerNorm
from polysense.nn.prototypes import Prototypes
from polysense.nn.transformer import Transformer
from polysense.objectives.spread import gather
from polysense.objectives.twin import distil_ce
from polysense.towers.vit import ViT
from polysense.weights import dino_facebook, dino_hf

card = Card(
    name="DINO", paper="Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021",
    arxiv="2104.14294", year=2021, says="Learns pictures without labels by agreeing with its own average; its attention outlines objects.",
    needs=("views", "crops"), can=("encode_image", "attend"), official="facebookresearch/dino",
)

PARAMETERS = 43_952_256                      # ViT-S/16 without a head 21,665,664, its head 22,286,592 (the teacher, as large again, has no gradient)

weights = {"hf": dino_hf.LAYOUT, "facebook": dino_facebook.LAYOUT}


@final
class DINO(TwinViews):
    heat: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(TwinViews.Config):
        centre: Spec | None                  # a Centre.Config of the head's width; None for a system that is not trained any more
        student_temperature: float = 0.1
        teacher_temperature: tuple[float, float] = (0.04, 0.07)     # at first, and from a share `warming` of the training on
        warming: float = 0.1
        still: float = 0.01                  # share of the training in which the last layer of the head does not move

    def __init__(self, c: Config):
        super().__init__(c)
        self.centre: Any = None if c.centre is None else c.centre.build()
        self.student_temperature, self.ends, self.warming, self.still = c.student_temperature, c.teacher_temperature, c.warming, c.still
        self.register_buffer("heat", torch.tensor(self.ends[0]))
        if c.still > 0 and hasattr(self.projector, "gate"):
            self.projector.gate.zero_()

    def losses(self, batch: Batch) -> Losses:
        if self.centre is None or self.teacher is None:
            raise UserError("this DINO has no teacher: it was opened for its features alone", "train the preset tiny or paper")
        views, crops = batch["views"].unbind(1), batch["crops"]
        with torch.no_grad():
            said = self.aim(torch.cat(views))
            target = answers(self.centre, said.float(), self.heat).unflatten(0, (len(views), -1))
        large = self.backbone.pooled(torch.cat(views))
        small = self.backbone.pooled(crops.transpose(0, 1).flatten(0, 1))
        student = self.projector(torch.cat([large, small])).unflatten(0, (len(views) + crops.shape[1], -1))
        one, two = large.unflatten(0, (len(views), -1))[:2]
        return Losses(distil=distil_ce(student, target, self.student_temperature)).keeping(
            output=gather(said.float().mean(0, keepdim=True)), answer=target.flatten(0, 1), one=one, two=two)

    def after_step(self, after: After) -> None:
        super().after_step(after)
        self.centre.move(after.keep["output"])
        warm = min(1.0, after.progress / self.warming) if self.warming else 1.0
        self.heat.fill_(self.ends[0] + (self.ends[1] - self.ends[0]) * warm)
        self.projector.gate.fill_(float(after.progress >= self.still))

    def attend(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,heads,h,w]: where the class token of the teacher's last block looks. UserError for a convolutional backbone."""
        if not hasattr(self.tower, "attention"):
            raise UserError("a convolutional backbone attends to nothing", "train dino with a ViT")
        return self.tower.attention(image)


DINO.choices = {"centre": {      # `none`: the mean that is taken off stays zero
    "mean": lambda p: p, "sinkhorn": lambda p: p.but(**{"config.centre": Sinkhorn.Config()}),
    "none": lambda p: p.but(**{"config.centre.momentum": 1.0})}}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tower(size: int, patch: int, width: int, depth: int, heads: int, drop_path: float = 0.0, eps: float = 1e-6) -> ViT.Config:
    norm = LayerNorm.Config(eps=eps)
    return ViT.Config(image_size=size, patch=patch, body=Transformer.Config(
        width=width, depth=depth, heads=heads, norm=norm, drop_path=drop_path, block=PreNorm.Config(norm=norm)))


def preset(data: str, backbone: Spec, head: Prototypes.Config, feed: CropFeed, teacher: Teacher.Config, stage: Stage, still: float) -> Preset:
    return Preset(data=data, feed=feed, stages=(stage,), config=DINO.Config(
        backbone=backbone, projector=head, teacher=teacher, reads="teacher", centre=Centre.Config(width=head.out), still=still))


def tiny() -> Preset:
    view = ViewPlan(size=32, scale=(0.4, 1.0), flip=0.5, jitter=0.5, jitter_by=(0.3, 0.0, 0.0, 0.0))
    return preset(
        "scenes:single", tower(32, 4, 96, 4, 3), Prototypes.Config(into=96, out=512, hidden=192, bottleneck=64),
        CropFeed(image=ImagePlan(size=32, mean=MEAN, std=STD), views=(view, view), crops=(view.but(size=16, scale=(0.1, 0.4)),) * 3),
        Teacher.Config(momentum=0.99, final=1.0, mode="eval"), still=0.02, stage=Stage(
            objective=DINO.losses, steps=600, batch_size=64, optim=RisingDecay(lr=1e-3, weight_decay=0.04, final_decay=0.4, warmup=60, clip=3.0)))


def paper() -> Preset:
    """ViT-S/16, 800 epochs of batch 1024, eight small crops (section 3.2 and the released arguments)."""
    epoch, base = 1_281_167 // 1024, ViewPlan(size=224, scale=(0.25, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.2, 0.1), grey=0.2)
    made = preset(
        "imagenet1k", tower(224, 16, 384, 12, 6, drop_path=0.1), Prototypes.Config(into=384),
        CropFeed(image=ImagePlan(size=224, mean=MEAN, std=STD), views=(base.but(blur=1.0), base.but(blur=0.1, solarize=0.2)),
                 crops=(base.but(size=96, scale=(0.05, 0.25), blur=0.5),) * 8),
        Teacher.Config(momentum=0.996, final=1.0, mode="eval"), still=1 / 800, stage=Stage(
            objective=DINO.losses, steps=800 * epoch, batch_size=1024,
            optim=RisingDecay(lr=5e-4 * 1024 / 256, weight_decay=0.04, final_decay=0.4, warmup=10 * epoch, clip=3.0, final=1e-6 / 2e-3)))
    return made.but(**{"config.warming": 30 / 800})


def features() -> Preset:
    """The published backbone alone, as transformers has it: nothing to train on."""
    return paper().but(config=paper().config.but(projector=Nothing.Config(), teacher=None, reads="student", centre=None))
