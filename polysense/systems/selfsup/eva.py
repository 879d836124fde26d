"""EVA: a plain ViT of a billion parameters that says of hidden patches what CLIP says of them, and then becomes CLIP's image tower itself.

Some 40 percent of the patches (105 of 256) are hidden block by block, their embeddings replaced by one learned token; all tokens pass a ViT with
learned absolute positions, no relative biases, no scaled branches, no bias of the keys; a linear layer behind the last norm names the feature of
a frozen CLIP, its patch tokens behind its last norm and its projection, of the same crop:

    L = - mean over hidden patches i of  cos(W h_i + b, clip(x)_i)                                                (section 2.1, here 1 - cos)

The cosine norms both sides, nothing else does. The finding is what is not there: no codebook, no further distillation. Linears that write to the
residual stream start divided by sqrt(2 l). Afterwards the encoder is the Start of a CLIP, of dense tasks, whose patches of 16 px take its kernels
of 14 px interpolated (`patches`), or of a classifier: tuned on ImageNet-21k, then on ImageNet-1k at a larger size (`intermediate`, `finetune`), the
norm behind the mean of the patches.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.classifier import MixedClassifier
from polysense.archetypes.masked_model import MaskedFeatures
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import AugmentPlan, Feed, ImagePlan, Optim, Preset, Stage, Start, ViewPlan, final
from polysense.decoders.codes import CodeHead
from polysense.decoders.features import FeatureTarget
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden
from polysense.mechanisms.mixing import Mixing
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear
from polysense.nn.init import RescaledInit
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.towers.clip import body, image_tower
from polysense.towers.shapes import tuned_vit
from polysense.towers.vit import ViT
from polysense.weights import eva

card = Card(
    name="EVA", paper="Fang et al., EVA: Exploring the Limits of Masked Visual Representation Learning at Scale, CVPR 2023",
    arxiv="2211.07636", year=2023,
    says="Learns pictures without labels by saying of hidden patches what CLIP says of them, at a scale of a billion parameters.",
    needs=("image", "label|image"), can=("encode_image",), official="baaivision/EVA",
)

PARAMETERS = 1_316_195_840                   # ViT-g/14 with its mask token and head 1.01B, CLIP's image tower ViT-L/14 0.30B

weights = {"baai": eva.BAAI, "baai_classifier": eva.BAAI_CLASSIFIER, "timm": eva.TIMM}

PLAN = ImagePlan(size=224)                   # CLIP's mean and deviation, for the student too (released code)
TUNED = ImagePlan(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))       # fine-tuned on ImageNet's
LEARNS = ("encoder.*", "hide.*", "decoder.*")


@final
class EVA(MaskedFeatures):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedFeatures.Config):
        pass

    def patches(self, side: int) -> Tensor:
        """The kernels of the patch embedding [D,3,P,P] for patches of another side: interpolated, bicubic."""
        if side < 1:
            raise UserError(f"patches of {side} pixels", "they have one at least")
        return F.interpolate(self.encoder.patch.weight.detach().float(), (side, side), mode="bicubic", align_corners=False)


@final
class EVAClassifier(MixedClassifier):
    """The fine-tuned form."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MixedClassifier.Config):
        pass


def tower(size: int, patch: int, width: int, depth: int, heads: int, hidden: int, drop_path: float = 0.0) -> ViT.Config:
    """EVA's ViT: learned positions, queries and values with a bias, keys without."""
    norm = LayerNorm.Config(eps=1e-6)
    return ViT.Config(image_size=size, patch=patch, pool="mean", body=Transformer.Config(
        width=width, depth=depth, heads=heads, norm=norm, drop_path=drop_path, init=RescaledInit.Config(std=0.015),
        block=PreNorm.Config(attn=Attention.Config(bias="q v out"), mlp=MLP.Config(hidden=hidden), norm=norm)))


def preset(size: int, encoder: ViT.Config, hidden: int, least: int, teacher: ViT.Config, width: int, start: str, data: str, stage: Stage) -> Preset:
    target = FeatureTarget.Config(tower=teacher, head=Linear.Config(into=teacher.width, out=width), width=width)
    return Preset(
        data=data, stages=(stage,), feed=Feed(image=PLAN.but(size=size), train_image=ViewPlan(size=size, scale=(0.2, 1.0), flip=0.5)),
        starts=tuple(Start(into=f"target.{a}", from_="clip", take=b, preset=start) for a, b in (("tower", "vision"), ("head", "image_head"))),
        config=EVA.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least), hide=FillHidden.Config(),
                          decoder=CodeHead.Config(), target=target))


def tiny() -> Preset:
    """64 px in patches of 8, taught by `clip` tiny_vit."""
    return preset(64, tower(64, 8, 96, 4, 3, 384), 26, 6, image_tower(64, 8, body(192, 6, 3)), 192, "tiny_vit", "scenes", Stage(
        objective=EVA.losses, trainable=LEARNS, steps=500, batch_size=64,
        optim=Optim(lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6, warmup=50, clip=3.0)))


def paper() -> Preset:
    """ViT-g/14 (40 blocks of 1408) on 29.6 million pictures, 150 epochs of batch 4096, taught by CLIP ViT-L/14 (tables 2 and 3)."""
    epoch = 29_600_000 // 4096
    return preset(224, tower(224, 14, 1408, 40, 16, 6144, 0.1), 105, 16, image_tower(224, 14, body(1024, 24, 16)), 768, "paper", "merged30m", Stage(
        objective=EVA.losses, trainable=LEARNS, steps=150 * epoch, batch_size=4096, checkpoint_activations=True,
        optim=Optim(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6, warmup=2 * epoch, clip=3.0)))


def classifier(encoder: ViT.Config, classes: int, starts: tuple[Start, ...], data: str, plan: ImagePlan, least: float, stage: Stage,
               drop_path: float = 0.4, smoothing: float = 0.1, cutmix: float = 0.0) -> Preset:
    """least: the smallest share of a picture that a view shows. Nothing is erased, two pictures are never blended (released scripts)."""
    backbone, head = tuned_vit(encoder.but(image_size=plan.size), classes, drop_path)
    return Preset(
        data=data, starts=starts, stages=(stage,),
        feed=Feed(image=plan, train_image=AugmentPlan(size=plan.size, scale=(least, 1.0), flip=0.5, erase=0.0)),
        config=EVAClassifier.Config(backbone=backbone, head=head, smoothing=smoothing, mix=Mixing.Config(classes=classes, mixup=0.0, cutmix=cutmix)))


def paper_encoder() -> ViT.Config:
    return paper().config.encoder  # type: ignore[attr-defined]


def intermediate() -> Preset:
    """All of ImageNet-21k at 224 px, with CutMix, 60 epochs of batch 4096 with layer decay 0.85 (released script)."""
    epoch = 14_197_122 // 4096
    start = Start(into="backbone", from_="eva", take="encoder", preset="paper")
    return classifier(paper_encoder(), 21_841, (start,), "imagenet21k", TUNED, 0.5, Stage(
        objective=EVAClassifier.losses, steps=60 * epoch, batch_size=4096, checkpoint_activations=True,
        optim=Optim(lr=1e-4, weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6, layer_decay=0.85, warmup=15 * epoch)), cutmix=1.0)


def _imagenet(size: int, epochs: int, batch: int, layer_decay: float, starts: tuple[Start, ...], plan: ImagePlan) -> Preset:
    epoch = 1_281_167 // batch
    return classifier(paper_encoder(), 1000, starts, "imagenet1k", plan.but(size=size), 0.08, Stage(
        objective=EVAClassifier.losses, steps=epochs * epoch, batch_size=batch, ema=0.9999, checkpoint_activations=True,
        optim=Optim(lr=3e-5, weight_decay=0.05, layer_decay=layer_decay, warmup=2 * epoch)), smoothing=0.3)


AFTER_21K = tuple(Start(into=part, from_="eva", take=part, preset="intermediate") for part in ("backbone", "head.norm"))


def finetune() -> Preset:
    """ImageNet-1k at 336 px, 10 epochs of batch 512 with layer decay 0.95 after `intermediate`; pictures are squashed, weights averaged (released
    script)."""
    return _imagenet(336, 10, 512, 0.95, AFTER_21K, TUNED.but(fit="squash"))


def finetune_560() -> Preset:
    """The same at 560 px, 15 epochs."""
    return _imagenet(560, 15, 512, 0.95, AFTER_21K, TUNED.but(fit="squash"))


def clip_finetune() -> Preset:
    """The image tower of EVA-CLIP on ImageNet-1k at 224 px, 20 epochs of batch 1024 with layer decay 0.9, in CLIP's colours (released script)."""
    return _imagenet(224, 20, 1024, 0.9, (Start(into="backbone", from_="eva_clip", take="vision", preset="g_14"),), PLAN)


def tiny_finetune() -> Preset:
    """The encoder of `tiny` on 500 labelled scenes of fifteen shapes."""
    return classifier(tiny().config.encoder, 15, (Start(into="backbone", from_="eva", take="encoder"),), "scenes:single?n=500",  # type: ignore[attr-defined]
                      PLAN.but(size=64), 0.6, Stage(objective=EVAClassifier.losses, steps=200, batch_size=64, optim=Optim(
                          lr=1e-3, weight_decay=0.05, layer_decay=0.75, warmup=20, clip=1.0)), drop_path=0.0)
