"""ViT: a picture is a sentence of patches.

    z0 = [cls; x1 E; ...; xN E] + E_pos;   z' = z + MSA(LN(z));   z = z' + MLP(LN(z'));   y = LN(z_L)[cls]        (equations 1 to 4)

Pre-training puts a head with one tanh layer on y, fine-tuning a dense layer that starts at zero; another resolution keeps the patch and
interpolates the patch positions in two dimensions.
"""
from dataclasses import dataclass

from polysense.archetypes.classifier import Classifier
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.nn.block import PreNorm
from polysense.nn.head import LinearBias, TanhHead
from polysense.nn.init import XavierInit
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.classify import softmax_ce
from polysense.towers.vit import ViT
from polysense.weights import vit_hf, vit_jax, vit_timm

card = Card(
    name="ViT", paper="Dosovitskiy et al., An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, ICLR 2021",
    arxiv="2010.11929", year=2021, says="Sorts pictures into classes with a plain transformer over patches; the default image tower of the house.",
    needs=("image", "label"), can=("encode_image", "classify"), official="google-research/vision_transformer",
)

PARAMETERS = 103_186_515                     # ViT-B/16 with its tanh layer and 21,843-class head (102,595,923 without the layer)

weights = {"timm": vit_timm.LAYOUT, "hf": vit_hf.LAYOUT, "jax": vit_jax.LAYOUT}


@final
class VisionTransformer(Classifier):
    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        return Losses(label=softmax_ce(self.classify(batch["image"]), batch["label"]))


def tower(size: int, patch: int, width: int, depth: int, heads: int, dropout: float = 0.0, eps: float = 1e-6) -> ViT.Config:
    """LayerNorm epsilon differs by source: 1e-6 in JAX and timm, 1e-12 in transformers."""
    norm = LayerNorm.Config(eps=eps)
    return ViT.Config(image_size=size, patch=patch, body=Transformer.Config(
        width=width, depth=depth, heads=heads, norm=norm, init=XavierInit.Config(),
        block=PreNorm.Config(norm=norm, dropout=dropout, mlp=MLP.Config(dropout=dropout))))


HALF = (0.5, 0.5, 0.5)


def tiny() -> Preset:
    return Preset(
        data="digits", config=VisionTransformer.Config(backbone=tower(32, 4, 96, 4, 3), head=LinearBias.Config(into=96, out=10)),
        feed=Feed(image=ImagePlan(size=32, mean=HALF, std=HALF), train_image=ViewPlan(size=32, scale=(0.7, 1.0))),
        stages=(Stage(objective=VisionTransformer.losses, steps=400, batch_size=128,
                      optim=Optim(lr=1e-3, weight_decay=0.03, warmup=40, clip=1.0)),))


def paper() -> Preset:
    """ViT-B/16 on ImageNet-21k (table 3): 90 epochs of batch 4096 at 224 px, linear decay."""
    return _pretraining(768, 12, 12)


def large() -> Preset:
    """ViT-L/16, the same way."""
    return _pretraining(1024, 24, 16)


def _pretraining(width: int, depth: int, heads: int) -> Preset:
    """Weight decay is decoupled, as in the authors' code: 0.03 of the gradient of a norm would leave nothing to learn."""
    head: Spec = TanhHead.Config(into=width, hidden=width, out=21_843)
    epoch = 14_197_122 // 4096
    return Preset(
        data="imagenet21k", config=VisionTransformer.Config(backbone=tower(224, 16, width, depth, heads, dropout=0.1), head=head),
        feed=Feed(image=ImagePlan(size=224, mean=HALF, std=HALF), train_image=ViewPlan(size=224, scale=(0.05, 1.0), flip=0.5)),
        stages=(Stage(objective=VisionTransformer.losses, steps=90 * epoch, batch_size=4096,
                      optim=Optim(lr=1e-3, weight_decay=0.03, warmup=10_000, schedule="linear")),))


def finetune() -> Preset:
    """ViT-B/16 carried to ImageNet-1k at 384 px under a dense head that starts at zero (section 3.2, table 4): 86,567,656 + 331,776 parameters."""
    base = paper()
    return base.but(
        data="imagenet1k", starts=(Start(into="backbone", from_="vit", take="backbone", preset="paper"),),
        feed=Feed(image=ImagePlan(size=384, mean=HALF, std=HALF), train_image=ViewPlan(size=384, scale=(0.05, 1.0), flip=0.5)),
        config=VisionTransformer.Config(backbone=tower(384, 16, 768, 12, 12), head=LinearBias.Config(into=768, out=1000, std=0.0)),
        stages=(Stage(objective=VisionTransformer.losses, steps=20_000, batch_size=512,
                      optim=Optim(name="sgd", lr=0.03, momentum=0.9, warmup=500, clip=1.0)),))
