"""EVA: a plain ViT of a billion parameters that says of hidden patches what CLIP says of them, and then becomes CLIP's image tower itself.

Some 40 percent of the patches (105 of 256) are hidden block by block, their embeddings replaced by one learned token; all tokens pass a ViT with
learned absolute positions, no relative biases, no scaled branches, no bias of the keys; a linear layer behind the last norm names the feature of
a frozen CLIP, its patch tokens behind its last norm and its projection, of the same crop:

    L = - mean over hidden patches i of  cos(W h_i + b, clip(x)_i)                                                (section 2.1, here 1 - cos)

The cosine norms both sides, nothing else does. The finding is what is not there: no codebook, no further distillation. Linears that write to the
residual stream start divided by sqrt(2 l). Afterwards the encoder is the Start of a CLIP, or of dense tasks, whose patches of 16 px take its
kernels of 14 px interpolated (`patches`).
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.masked_model import MaskedFeatures
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, Start, ViewPlan, final
from polysense.decoders.codes import CodeHead
from polysense.decoders.features import FeatureTarget
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear
from polysense.nn.init import RescaledInit
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.towers.clip import body, image_tower
from polysense.towers.vit import ViT
from polysense.weights import eva

card = Card(
    name="EVA", paper="Fang et al., EVA: Exploring the Limits of Masked Visual Representation Learning at Scale, CVPR 2023",
    arxiv="2211.07636", year=2023,
    says="Learns pictures without labels by saying of hidden patches what CLIP says of them, at a scale of a billion parameters.",
    needs=("image",), can=("encode_image",), official="baaivision/EVA",
)

PARAMETERS = 1_316_195_840                   # ViT-g/14 with its mask token and head 1.01B, CLIP's image tower ViT-L/14 0.30B

weights = {"baai": eva.BAAI}

PLAN = ImagePlan(size=224)                   # CLIP's mean and deviation, for the student too (released code)
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
