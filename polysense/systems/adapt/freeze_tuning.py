"""Freeze tuning: only chosen layers of a trained model go on training.

Lee et al. freeze a transformer from the input up and fine-tune the rest: the top quarter of the layers keeps about nine tenths of the quality. A plan
says what trains, in one syntax for all systems (last blocks, norms, biases, embeddings, patterns, one block more from stage to stage), and the house
keeps it: frozen modules stay in eval mode, have no optimiser state, and below the lowest trained layer nothing is kept for the backward pass.

    polysense train vit --adapt freeze_tuning:last=2,train="head.*" --data PHOTOS

This row is a classifier, of pictures or of texts, whose backbone comes from another run; the plan is `mechanisms/freeze.py`.
"""
from dataclasses import dataclass

import torch

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, Start, TextPlan, ViewPlan, final
from polysense.mechanisms.freeze import Freeze
from polysense.nn.block import PostNorm
from polysense.nn.head import LinearBias, TanhHead
from polysense.nn.norm import LayerNorm
from polysense.nn.residual import Basic, Stem
from polysense.nn.transformer import Transformer
from polysense.objectives.classify import softmax_ce
from polysense.towers.bert import Bert
from polysense.towers.resnet import ResNet

card = Card(
    name="Freeze tuning", paper="Lee et al., What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning, 2019",
    arxiv="1911.03090", year=2019, says="Carries a trained model to a new task by its last layers, norms or head alone: --adapt freeze_tuning.",
    needs=("image|text", "label"), can=("encode_image", "classify"), official=None,
)

PARAMETERS = 109_482_240                     # BERT base with its pooler; the head of two classes adds 1,538

adapter = Freeze                             # what `--adapt freeze_tuning` does to other systems


@final
class FreezeTuning(Classifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        reads: str = "image"                 # or "text": the batch key that the backbone reads

    def __init__(self, c: Config):
        super().__init__(c)
        self.reads = c.reads

    def losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch[self.reads]), batch["label"]))


HALF = (0.5, 0.5, 0.5)


def planned(preset: Preset, plan: Freeze) -> Preset:
    """The preset with what a plan trains."""
    with torch.device("meta"):
        system = preset.config.build()
    return preset.but(stages=plan.stages(preset.stages[0], system))


def tiny() -> Preset:
    """On the tower of `supervised`: digits, by the last of its four blocks and a new head."""
    tower = ResNet.Config(layers=(1, 1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=0), block=Basic.Config())
    return planned(Preset(
        data="digits", config=FreezeTuning.Config(backbone=tower, head=LinearBias.Config(into=192, out=10)),
        feed=Feed(image=ImagePlan(size=64, mean=HALF, std=HALF), train_image=ViewPlan(size=64, scale=(0.7, 1.0))),
        starts=(Start(into="backbone", from_="supervised", take="backbone"),),
        stages=(Stage(objective=FreezeTuning.losses, steps=150, batch_size=64, optim=Optim(lr=2e-3, weight_decay=0.05, warmup=15, clip=1.0)),)),
        Freeze(last=1, train="head.*"))


def paper() -> Preset:
    """BERT base on a task of GLUE (section 3): the top quarter of twelve layers and the head, three epochs of batch 16."""
    norm, width = LayerNorm.Config(eps=1e-12), 768
    tower = Bert.Config(vocab=30_522, length=512, norm_pre=norm, pooler=TanhHead.Config(into=width, hidden=width, out=0), body=Transformer.Config(
        width=width, depth=12, heads=12, norm=None, block=PostNorm.Config(norm=norm)))
    return planned(Preset(
        data="glue_sst2", config=FreezeTuning.Config(backbone=tower, head=LinearBias.Config(into=width, out=2, std=0.02), reads="text"),
        feed=Feed(text=TextPlan(kind="wordpiece", vocab=30_522, length=128)),
        starts=(Start(into="backbone", from_="bert", take="text", preset="paper"),),
        stages=(Stage(objective=FreezeTuning.losses, steps=3 * 67_349 // 16, batch_size=16, optim=Optim(lr=2e-5, schedule="linear")),)),
        Freeze(last=3, train="backbone.pooler.* head.*"))
