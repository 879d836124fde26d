"""Probes: how much does an encoder know? One classifier on the encoder of another run, and what of it may learn.

    finetune    every weight; rates fall along the depth, lr_l = lr decay^(L - l); the mean of the patches, a norm, a dense layer that begins small;
                mixed pictures, smoothed labels, stochastic depth (He et al. 2022, appendix A.1)
    scratch     the same without the encoder's weights: the control, at equal steps
    linear      a dense layer behind a batch norm without parameters; LARS, no decay (He et al. 2022, appendix A.1)
    sgd         a dense layer alone; SGD with a rate of 30, no decay (He et al. 2020, MoCo, section 4.1)
    dino        a dense layer alone, on the class tokens of the last four blocks side by side; SGD with a rate of 0.001 for each 256 of the batch,
                no decay (Caron et al. 2021, DINO, appendix F, and its released script)
    attentive   a learned query over the patches, then as `linear`, by SGD (Chen et al. 2022, CAE, section 4.2)

In the last four the encoder is frozen: no gradient, eval mode, not a bit of it changes. `polysense train probes protocol=linear encoder=simclr`
takes one of the protocols and another encoder, `optim.lr=0.01` another rate (DINO's authors try several and keep the best), `--data` other labels
(`...?n=500`: few). What needs no steps of its own (neighbours, logistic regression, ridge on few shots, the attentive probe on features in memory,
how the features lie) sits beside it as exams, all in one: `polysense exam RUN probes`.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from polysense.archetypes.classifier import MixedClassifier
from polysense.base.card import Card
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import AugmentPlan, Feed, ImagePlan, Optim, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.mechanisms.mixing import Mixing
from polysense.nn.attentive import AttentiveHead, AttentivePool
from polysense.nn.head import BatchLinear, LinearBias
from polysense.towers.shapes import tuned_vit
from polysense.towers.vit import LAST, ViT

card = Card(
    name="Probes", paper="He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (appendix A.1)", arxiv="2111.06377", year=2022,
    says="Tells how much an encoder knows: fine-tuning, linear and attentive probes of any other system, beside the same from scratch.",
    needs=("image", "label"), can=("encode_image", "classify"), official="facebookresearch/mae",
)

PARAMETERS = 86_416_360                      # ViT-B/16 with a head of 1000 classes, without its fixed table of positions

SLOTS = ("encoder", "backbone", "vision")    # where systems keep the image tower that they learn
ENCODERS = ("mae", "dino", "cae", "beit", "beit_v2", "maskfeat", "data2vec_vision", "mvp", "eva", "mim_framework", "simclr", "moco", "simsiam",
            "supervised", "clip")


@final
class Probes(MixedClassifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(MixedClassifier.Config):
        pass


# -- what learns, and how --------------------------------------------------------------------------------------------------------------------

def whole(preset: Preset) -> Spec:
    """The tower as its own run has it, before a protocol bends it."""
    start = preset.starts[0] if preset.starts else None
    return preset.config.backbone if start is None else lent(start)  # type: ignore[attr-defined]


def lent(start: Start) -> Any:
    """The tower that a Start takes. A teacher's ("teacher.module.backbone") is built as its student's."""
    return getattr(preset_of(start.from_, start.preset).config, start.take.rpartition(".")[2])


def classes_of(preset: Preset) -> int:
    return preset.config.mix.classes  # type: ignore[attr-defined]


def bent(preset: Preset, tower: Spec, head: Spec, stage: Stage, mix: tuple[float, float] = (0.0, 0.0), smoothing: float = 0.0) -> Preset:
    config = Probes.Config(backbone=tower, head=head, mix=Mixing.Config(classes=classes_of(preset), mixup=mix[0], cutmix=mix[1]), smoothing=smoothing)
    return preset.but(config=config, stages=(stage,))


def is_paper(preset: Preset) -> bool:
    return preset.data == "imagenet1k"


EPOCH = 1_281_167


def finetune(preset: Preset) -> Preset:
    """ViT-B of the paper: 100 epochs of batch 1024, blr 5e-4, layer decay 0.65, drop path 0.1. The final norm moves behind the pooling."""
    tower, classes = whole(preset), classes_of(preset)
    width = tower.width  # type: ignore[attr-defined]
    head: Spec = LinearBias.Config(into=width, out=classes, std=0.01)
    if isinstance(tower, ViT.Config):
        tower, head = tuned_vit(tower, classes, 0.1)
    if is_paper(preset):
        epoch = EPOCH // 1024
        return bent(preset, tower, head, Stage(objective=Probes.losses, steps=100 * epoch, batch_size=1024, optim=Optim(
            lr=5e-4 * 1024 / 256, weight_decay=0.05, layer_decay=0.65, warmup=5 * epoch)), (0.8, 1.0), 0.1).but(
                **{"feed.train_image": AugmentPlan(size=224, scale=(0.08, 1.0), flip=0.5)})
    return bent(preset, tower, head, Stage(objective=Probes.losses, steps=200, batch_size=64, optim=Optim(
        lr=2e-3, weight_decay=0.05, layer_decay=0.75, warmup=20, clip=1.0)), smoothing=0.1)


def scratch(preset: Preset) -> Preset:
    """The same steps from nothing."""
    return finetune(preset).but(starts=())


def probed(preset: Preset, tower: Spec, head: Spec, optim: Optim, batch: int, epochs: int, warm: int) -> Preset:
    """The head alone."""
    epoch = EPOCH // batch
    steps, warmup, size = (epochs * epoch, warm * epoch, batch) if is_paper(preset) else (200, 20, 64)
    plain = preset.feed.train_image
    assert plain is not None
    stage = Stage(objective=Probes.losses, trainable=("head.*",), steps=steps, batch_size=size, optim=optim.but(warmup=warmup))
    view = ViewPlan(size=plain.size, scale=(0.08, 1.0) if is_paper(preset) else plain.scale, flip=0.5)
    return bent(preset, tower, head, stage).but(**{"feed.train_image": view})


def linear(preset: Preset) -> Preset:
    """MAE: LARS, 0.1 for each 256 of a batch of 16384, 90 epochs; small batches keep its rate, as LARS moves every layer by a share of its length."""
    tower = whole(preset)
    head = BatchLinear.Config(into=tower.width, out=classes_of(preset))  # type: ignore[attr-defined]
    return probed(preset, tower, head, Optim(name="lars", lr=0.1 * 16_384 / 256), 16_384, 90, 10)


def sgd(preset: Preset) -> Preset:
    """MoCo: a rate of 30 for a batch of 256 and unit features; for 100 epochs, here on a cosine."""
    tower = whole(preset)
    head = LinearBias.Config(into=tower.width, out=classes_of(preset))  # type: ignore[attr-defined]
    return probed(preset, tower, head, Optim(name="sgd", lr=30.0 if is_paper(preset) else 0.5), 256, 100, 0)


def dino(preset: Preset) -> Preset:
    """DINO: 100 epochs of batch 1024 on a cosine. UserError for a tower without a class token in each of four blocks."""
    tower = whole(preset)
    if not isinstance(tower, ViT.Config) or not tower.prefix or tower.body.depth < LAST or tower.body.norm is None:
        raise UserError(f"{type(tower).__qualname__} has no class tokens behind its last {LAST} blocks", "take protocol=sgd, or the encoder of a ViT")
    head = LinearBias.Config(into=LAST * tower.width, out=classes_of(preset))
    return probed(preset, tower.but(pool="cls4"), head, Optim(name="sgd", lr=1e-3 * 1024 / 256 if is_paper(preset) else 0.02), 1024, 100, 0)


def attentive(preset: Preset) -> Preset:
    """CAE: SGD with a rate of 0.4, 90 epochs of batch 8192. UserError for a tower without tokens."""
    tower = whole(preset)
    if not isinstance(tower, ViT.Config):
        raise UserError(f"{type(tower).__qualname__} has no tokens that a query could look at",
                        "take protocol=linear, or the encoder of a transformer")
    pool = AttentivePool.Config(heads=tower.body.heads)
    head = AttentiveHead.Config(into=tower.width, out=classes_of(preset), prefix=tower.prefix, pool=pool)
    return probed(preset, tower.but(pool="none"), head, Optim(name="sgd", lr=0.4), 8192, 90, 10)


PROTOCOLS: dict[str, Callable[[Preset], Preset]] = {"finetune": finetune, "scratch": scratch, "linear": linear, "sgd": sgd, "dino": dino,
                                                       "attentive": attentive}


def protocol_of(preset: Preset) -> Callable[[Preset], Preset]:
    """Which of them a preset follows, read off what stands in it."""
    config, trains = preset.config, preset.stages[0].trainable
    head, tower = config.head, config.backbone  # type: ignore[attr-defined]
    if trains == ("*",):
        return finetune if preset.starts else scratch
    if isinstance(tower, ViT.Config) and tower.pool == "cls4":
        return dino
    return attentive if isinstance(head, AttentiveHead.Config) else linear if isinstance(head, BatchLinear.Config) else sgd


def on(preset: Preset, name: str) -> Preset:
    """The same protocol on the encoder of the system `name`, of its teacher where that is what it reads, and pictures as there."""
    theirs = preset_of(name)
    slot = next((s for s in SLOTS if hasattr(theirs.config, s)), "")
    slot = f"teacher.module.{slot}" if getattr(theirs.config, "reads", "") == "teacher" else slot
    plan: Any = theirs.feed.image
    view = ViewPlan(size=plan.size, scale=(0.6, 1.0), flip=0.5)
    protocol = protocol_of(preset)
    return protocol(preset.but(starts=(Start(into="backbone", from_=name, take=slot),), feed=Feed(image=plan, train_image=view)))


Probes.choices = {"encoder": {name: partial(on, name=name) for name in ENCODERS}, "protocol": PROTOCOLS}


def preset(start: Start, classes: int, plan: ImagePlan, view: ViewPlan, data: str, protocol: Callable[[Preset], Preset]) -> Preset:
    tower = lent(start)
    empty = Probes.Config(backbone=tower, head=LinearBias.Config(into=tower.width, out=classes), mix=Mixing.Config(classes=classes))
    stage = Stage(objective=Probes.losses, steps=1, batch_size=1, optim=Optim(lr=1.0))
    return protocol(Preset(data=data, config=empty, stages=(stage,), starts=(start,), feed=Feed(image=plan, train_image=view)))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _tiny(protocol: Callable[[Preset], Preset]) -> Preset:
    return preset(Start(into="backbone", from_="mae", take="encoder"), 15, ImagePlan(size=64, mean=MEAN, std=STD),
                  ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5), "scenes:single?n=500", protocol)


def tiny() -> Preset:
    """The encoder of `mae` tiny, tuned on 500 labelled scenes of fifteen shapes."""
    return _tiny(finetune)


def tiny_linear() -> Preset:
    """The same encoder, frozen, under a batch norm and a dense layer."""
    return _tiny(linear)


def tiny_attentive() -> Preset:
    """The same encoder, frozen, under a learned query."""
    return _tiny(attentive)


def tiny_dino() -> Preset:
    """The same encoder, frozen, under a dense layer on the class tokens of four blocks."""
    return _tiny(dino)


MAE_B, DINO_S = (Start(into="backbone", from_=f, take=t, preset=p) for f, t, p in (
    ("mae", "encoder", "vit_b_16"), ("dino", "teacher.module.backbone", "paper")))


def _paper(protocol: Callable[[Preset], Preset], start: Start = MAE_B) -> Preset:
    return preset(start, 1000, ImagePlan(size=224, mean=MEAN, std=STD),
                  ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5), "imagenet1k", protocol)


def paper() -> Preset:
    """ViT-B/16 of MAE on ImageNet-1k (table 9)."""
    return _paper(finetune)


def paper_linear() -> Preset:
    """Linear probe (He et al. 2022, table 10)."""
    return _paper(linear)


def paper_attentive() -> Preset:
    """Attentive probe (Chen et al. 2022, CAE, appendix)."""
    return _paper(attentive)


def paper_dino() -> Preset:
    """Linear probe of DINO's ViT-S/16 (Caron et al. 2021, table 2): its teacher, four class tokens of 384."""
    return _paper(dino, DINO_S)
