"""MoCo: contrast as looking up a dictionary whose keys come from a slowly moving encoder.

A query q = f_q(view 1) should find its key k = f_k(view 2) among many others. f_k is never trained: theta_k <- m theta_k + (1 - m) theta_q.

v1, v2 keep the K newest keys in a queue, so that a small batch meets many negatives:

    L = -log exp(q.k / tau) / (exp(q.k / tau) + sum_queue exp(q.k_i / tau))                                       (v1, equation 1)

The loss sees the queue as it was before this batch; the batch's keys replace the oldest afterwards. Norms take their statistics over parts of the
batch, and the pictures of the keys are shuffled between the parts, or the statistics would tell which key belongs to the query. v2 is v1 with
a hidden layer in the head, tau 0.2, blur, and a cosine schedule.

v3 has no queue: the keys of the global batch are each other's negatives, both views are query once, the query alone passes a predictor, and a
vision transformer keeps its random patch projection, which makes it stable:

    L = 2 tau (CE(q1 k2 / tau) + CE(q2 k1 / tau))                                                                 (v3, algorithm 1)
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.twin_views import TwinViews
from polysense.base.card import Card
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, ViewPlan, final
from polysense.mechanisms.queue import Queue
from polysense.mechanisms.teacher import Teacher
from polysense.nn.block import PreNorm
from polysense.nn.head import LinearBias, Projector
from polysense.nn.init import XavierInit
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm, SplitNorm
from polysense.nn.residual import Basic, Bottleneck, Stem
from polysense.nn.transformer import Transformer
from polysense.objectives.spread import gather
from polysense.objectives.twin import batch_nce, queue_nce
from polysense.towers.resnet import ResNet
from polysense.towers.vit import ViT
from polysense.weights import moco_facebook

card = Card(
    name="MoCo", paper="He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020; Chen et al. 2020 (v2), 2021 (v3)",
    arxiv="1911.05722", year=2020, says="Learns pictures without labels by finding one view of a picture among the keys of many others.",
    needs=("views",), can=("encode_image",), official="facebookresearch/moco",
)

PARAMETERS = 27_966_656                      # ResNet-50 without its classifier, 23,508,032, and v2's head, 4,458,624

weights = {"facebook": moco_facebook.LAYOUT}


@final
class MoCo(TwinViews):
    @dataclass(frozen=True, kw_only=True)
    class Config(TwinViews.Config):
        queue: Spec | None = None            # a Queue.Config (v1, v2)
        predictor: Spec | None = None        # v3, on the query side alone
        temperature: float = 0.2

    def __init__(self, c: Config):
        super().__init__(c)
        self.queue: Any = None if c.queue is None else c.queue.build()
        self.predictor: Any = None if c.predictor is None else c.predictor.build()
        self.temperature = c.temperature

    def keys(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> the teacher's unit keys [B,D]; the pictures pass in random order, so that no part of the batch is its query's."""
        order = torch.randperm(len(image), device=image.device)
        return F.normalize(self.aim(image[order]).float(), dim=-1)[order.argsort()]

    def look_up(self, batch: Batch) -> Losses:
        """v1 and v2: view 1 asks, view 2 answers."""
        one, two = batch["views"].unbind(1)
        query, key = F.normalize(self.project(one).float(), dim=-1), self.keys(two)
        if self.queue is None:               # nothing to look up but the batch
            return Losses(contrast=batch_nce(query, key, self.temperature) / (2 * self.temperature)).keeping(one=query, two=key)
        return Losses(contrast=queue_nce(query, key, self.queue.keys, self.temperature)).keeping(keys=gather(key), one=query, two=key)

    def meet(self, batch: Batch) -> Losses:
        """v3: both views ask, among the keys of the global batch."""
        one, two = batch["views"].unbind(1)
        asked = [F.normalize(self.predictor(self.project(v)).float(), dim=-1) for v in (one, two)]
        keys = [F.normalize(self.aim(v).float(), dim=-1) for v in (one, two)]
        contrast = batch_nce(asked[0], keys[1], self.temperature) + batch_nce(asked[1], keys[0], self.temperature)
        return Losses(contrast=contrast).keeping(one=asked[0], two=keys[1])

    def after_step(self, after: After) -> None:
        super().after_step(after)
        if "keys" in after.keep:
            self.queue.push(after.keep["keys"])


MoCo.choices = {"queue": {"keys": lambda p: p, "none": lambda p: p.but(**{"config.queue": None})},
                "keys": {"teacher": lambda p: p, "live": lambda p: p.but(**{"config.teacher.momentum": 0.0})}}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preset(size: int, data: str, views: tuple[ViewPlan, ViewPlan], config: MoCo.Config, stage: Stage) -> Preset:
    return Preset(data=data, feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), views=views), config=config, stages=(stage,))


def tiny() -> Preset:
    """v2 with a small residual network, a queue of 2,048 and a faster key encoder, as there are few steps."""
    tower = ResNet.Config(layers=(1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0, norm=SplitNorm.Config(groups=4)),
                          block=Basic.Config(norm=SplitNorm.Config(groups=4)))
    view = ViewPlan(size=32, scale=(0.4, 1.0), flip=0.5, jitter=0.5, jitter_by=(0.3, 0.0, 0.0, 0.0))
    return preset(32, "scenes:single", (view, view), MoCo.Config(
        backbone=tower, projector=MLP.Config(width=96, hidden=96, out=64, act="relu"), teacher=Teacher.Config(momentum=0.99),
        queue=Queue.Config(size=2048, width=64)), Stage(
            objective=MoCo.look_up, steps=600, batch_size=128, optim=Optim(lr=1e-3, weight_decay=1e-4, warmup=30)))


def v1() -> Preset:
    """ResNet-50 on ImageNet-1k: a linear head, tau 0.07, K 65,536, m 0.999, 200 epochs of batch 256 (v1, section 4)."""
    norm, epoch = SplitNorm.Config(groups=8), 1_281_167 // 256
    tower = ResNet.Config(block=Bottleneck.Config(norm=norm), stem=Stem.Config(norm=norm))
    view = ViewPlan(size=224, scale=(0.2, 1.0), flip=0.5, jitter=1.0, jitter_by=(0.4, 0.4, 0.4, 0.4), grey=0.2)
    return preset(224, "imagenet1k", (view, view), MoCo.Config(
        backbone=tower, projector=LinearBias.Config(into=2048, out=128), teacher=Teacher.Config(momentum=0.999), temperature=0.07,
        queue=Queue.Config(size=65_536, width=128)), Stage(
            objective=MoCo.look_up, steps=200 * epoch, batch_size=256,
            optim=Optim(name="sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, schedule="step", milestones=(0.6, 0.8))))


def paper() -> Preset:
    """v2: v1 with a two-layer head, tau 0.2, blur and weaker hue, a cosine schedule (Chen et al. 2020, table 1)."""
    view = ViewPlan(size=224, scale=(0.2, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
    return v1().but(**{"config.projector": MLP.Config(width=2048, hidden=2048, out=128, act="relu"), "config.temperature": 0.2,
                       "feed.views": (view, view), "stages.0.optim.schedule": "cosine", "stages.0.optim.milestones": ()})


def v3() -> Preset:
    """ViT-B/16, 300 epochs of batch 4096, tau 0.2, m 0.99 to 1, the patch projection frozen (Chen et al. 2021, sections 4 and 5)."""
    norm, epoch = LayerNorm.Config(eps=1e-6), 1_281_167 // 4096
    body = Transformer.Config(width=768, depth=12, heads=12, norm=norm, init=XavierInit.Config(), block=PreNorm.Config(norm=norm))
    base = ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.2, 0.1), grey=0.2)
    return preset(224, "imagenet1k", (base.but(blur=1.0), base.but(blur=0.1, solarize=0.2)), MoCo.Config(
        backbone=ViT.Config(image_size=224, patch=16, body=body, position="sincos", std=1e-6),
        projector=Projector.Config(widths=(768, 4096, 4096, 256), last="norm"), predictor=Projector.Config(widths=(256, 4096, 256), last="norm"),
        teacher=Teacher.Config(momentum=0.99, final=1.0)), Stage(
            objective=MoCo.meet, steps=300 * epoch, batch_size=4096, trainable=("backbone.cls", "backbone.body.*", "projector.*", "predictor.*"),
            optim=Optim(lr=1.5e-4 * 4096 / 256, weight_decay=0.1, warmup=40 * epoch)))


def v3_resnet() -> Preset:
    """ResNet-50, 1000 epochs: LARS, a two-layer projector, a predictor without a norm at its end, tau 1, crops of at least a fifth (Chen et al.
    2021, appendix, and the released arguments)."""
    epoch = 1_281_167 // 4096
    return v3().but(**{
        "feed.views.0.scale": (0.2, 1.0), "feed.views.1.scale": (0.2, 1.0),
        "config.backbone": ResNet.Config(), "config.projector": Projector.Config(widths=(2048, 4096, 256), last="norm"), "config.temperature": 1.0,
        "config.predictor": Projector.Config(widths=(256, 4096, 256), last="nothing"), "config.teacher.momentum": 0.996,
        "stages.0.trainable": ("*",), "stages.0.steps": 1000 * epoch,
        "stages.0.optim": Optim(name="lars", lr=0.3 * 4096 / 256, momentum=0.9, weight_decay=1.5e-6, warmup=10 * epoch)})
