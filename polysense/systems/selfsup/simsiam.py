"""SimSiam: two views of a picture predict each other, without negatives, without a momentum encoder, in small batches.

    z = f(x),  p = h(z)                                                      f: backbone and projector, h: predictor (section 3)
    D(p, z) = -cos(p, z)                                                                                            (equation 1)
    L = D(p1, sg(z2)) / 2 + D(p2, sg(z1)) / 2                                                                       (equation 4)

Both views pass the same weights. The stop-gradient sg on the target is what keeps f from answering every picture alike: without it (`agree_freely`)
the loss falls to -1 at once and the spread of the features to nothing. Each predictor's step moves it towards the mean of what its target may be
(section 5), for which it keeps its learning rate while that of the encoder falls.
"""
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.twin_views import TwinViews
from polysense.base.card import Card
from polysense.base.plan import SteadyRates
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Preset, Spec, Stage, ViewPlan, final
from polysense.nn.head import Nothing, Projector
from polysense.nn.residual import Basic, Bottleneck, Stem
from polysense.objectives.twin import mirror_cosine
from polysense.towers.resnet import ResNet
from polysense.weights import simsiam_facebook

card = Card(
    name="SimSiam", paper="Chen and He, Exploring Simple Siamese Representation Learning, CVPR 2021",
    arxiv="2011.10566", year=2021, says="Learns pictures without labels from pairs of views that predict each other, with nothing to tell them from.",
    needs=("views",), can=("encode_image",), official="facebookresearch/simsiam",
)

PARAMETERS = 38_199_360                      # ResNet-50 23,508,032, projector 12,591,104, predictor 2,100,224

weights = {"facebook": simsiam_facebook.LAYOUT}


@final
class SimSiam(TwinViews):
    @dataclass(frozen=True, kw_only=True)
    class Config(TwinViews.Config):
        predictor: Spec | None               # None: the projection itself is compared (section 4.2: it collapses)

    def __init__(self, c: Config):
        super().__init__(c)
        self.predictor: Any = (c.predictor or Nothing.Config()).build()

    def both(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The projections [B,D] of the two views, and what is predicted from them."""
        seen = [self.project(v) for v in batch["views"].unbind(1)]
        return seen, [self.predictor(z) for z in seen]

    def agree(self, batch: Batch) -> Losses:
        seen, said = self.both(batch)
        return Losses(agree=mirror_cosine(*said, *seen)).keeping(one=seen[0], two=seen[1])

    def agree_freely(self, batch: Batch) -> Losses:
        """Without the stop-gradient: what the paper shows to collapse (section 4.1)."""
        seen, said = self.both(batch)
        pairs = zip(said, reversed(seen), strict=True)
        agree = -sum((F.cosine_similarity(p.float(), z.float(), dim=-1).mean() for p, z in pairs), seen[0].new_zeros(())) / 2
        return Losses(agree=agree).keeping(one=seen[0], two=seen[1])


SimSiam.choices = {
    "stop_gradient": {"target": lambda p: with_objective(p, SimSiam.agree), "off": lambda p: with_objective(p, SimSiam.agree_freely)},
    "predictor": {"mlp": lambda p: p, "none": lambda p: without_predictor(p)}}


def with_objective(of: Preset, objective: Any) -> Preset:
    return of.but(stages=tuple(s.but(objective=objective) for s in of.stages))


def without_predictor(of: Preset) -> Preset:
    """No predictor, and so nothing whose rate is to be kept."""
    return of.but(**{"config.predictor": None, **{f"stages.{i}.optim.steady": () for i in range(len(of.stages))}})


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preset(size: int, data: str, view: ViewPlan, backbone: ResNet.Config, dim: int, hidden: int, stage: Stage) -> Preset:
    return Preset(data=data, feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), views=(view, view)), stages=(stage,), config=SimSiam.Config(
        backbone=backbone, projector=Projector.Config(widths=(backbone.width, dim, dim, dim), last="norm"),
        predictor=Projector.Config(widths=(dim, hidden, dim))))


def tiny() -> Preset:
    """A small residual network, a projector of 128."""
    tower = ResNet.Config(layers=(1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config(last_gamma=0.0))
    view = ViewPlan(size=32, scale=(0.4, 1.0), flip=0.5, jitter=0.5, jitter_by=(0.3, 0.0, 0.0, 0.0))
    return preset(32, "scenes:single", view, tower, 128, 32, Stage(
        objective=SimSiam.agree, steps=600, batch_size=64,
        optim=SteadyRates(name="sgd", lr=0.06, momentum=0.9, weight_decay=1e-4, steady=("predictor.*",))))


def paper() -> Preset:
    """ResNet-50, 100 epochs of batch 512, SGD with lr 0.05 for each 256 pictures, no warm-up (section 3, baseline settings)."""
    epoch = 1_281_167 // 512
    view = ViewPlan(size=224, scale=(0.2, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
    return preset(224, "imagenet1k", view, ResNet.Config(block=Bottleneck.Config(last_gamma=0.0)), 2048, 512, Stage(
        objective=SimSiam.agree, steps=100 * epoch, batch_size=512,
        optim=SteadyRates(name="sgd", lr=0.05 * 512 / 256, momentum=0.9, weight_decay=1e-4, steady=("predictor.*",))))
