"""MAE: hide three quarters of a picture, encode the rest, draw what is missing.

Each sample keeps int(N (1 - ratio)) patches, drawn uniformly. The encoder, a plain ViT, computes these and its class token, nothing else: no
mask token ever enters it, which is why it trains about three times faster. A narrow decoder gets the encoded patches, one shared learned token in
every hidden place, and positions for all; it is thrown away after pre-training.

    L = mean over hidden patches i of | decoder(encoder(x_visible))_i - t_i |^2                                   (section 3)

with t_i the pixels of patch i, for better features less their own mean and divided by their own deviation. Positions of both are fixed
sines and cosines. The only augmentation is crop and flip: the masking is the augmentation.
"""
from dataclasses import dataclass

from polysense.archetypes.masked_model import MaskedPictures
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, ViewPlan, final
from polysense.decoders.mae import MAEDecoder
from polysense.decoders.pixels import PixelTarget
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.nn.block import PreNorm
from polysense.nn.init import XavierInit
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.masked import masked_mse
from polysense.towers.vit import ViT
from polysense.weights import mae_facebook, mae_hf

card = Card(
    name="MAE", paper="He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022",
    arxiv="2111.06377", year=2022, says="Learns pictures without labels by drawing the three quarters of them that it is not shown.",
    needs=("image",), can=("encode_image", "reconstruct"), official="facebookresearch/mae",
)

PARAMETERS = 329_239_296                     # ViT-L/16 and its decoder; the two fixed position tables, 302,592 numbers, are not counted

weights = {"hf": mae_hf.LAYOUT, "facebook": mae_facebook.LAYOUT}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class MAE(MaskedPictures):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedPictures.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        return Losses(pixels=masked_mse(*self.pairs(image, self.masking(image))))


def tower(width: int, depth: int, heads: int, eps: float = 1e-6) -> Transformer.Config:
    norm = LayerNorm.Config(eps=eps)
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=norm, init=XavierInit.Config(), block=PreNorm.Config(norm=norm))


def preset(size: int, patch: int, encoder: Transformer.Config, decoder: Transformer.Config, norm: str, data: str, stage: Stage) -> Preset:
    return Preset(
        data=data, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), train_image=ViewPlan(size=size, scale=(0.2, 1.0), flip=0.5)),
        config=MAE.Config(
            encoder=ViT.Config(image_size=size, patch=patch, body=encoder, pool="mean", position="sincos"), sampler=RandomMask.Config(ratio=0.75),
            decoder=MAEDecoder.Config(body=decoder), target=PixelTarget.Config(patch=patch, norm=norm)))


def tiny() -> Preset:
    return preset(64, 8, tower(128, 4, 4), tower(96, 2, 3), "none", "scenes", Stage(
        objective=MAE.losses, steps=600, batch_size=128, optim=Optim(lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=60, clip=1.0)))


def paper() -> Preset:
    """ViT-L/16 on ImageNet-1k, 1600 epochs of batch 4096, normalised pixels (table 8)."""
    epoch = 1_281_167 // 4096
    return preset(224, 16, tower(1024, 24, 16), tower(512, 8, 16), "patch", "imagenet1k", Stage(
        objective=MAE.losses, steps=1600 * epoch, batch_size=4096,
        optim=Optim(lr=1.5e-4 * 4096 / 256, betas=(0.9, 0.95), weight_decay=0.05, warmup=40 * epoch)))


def vit_b_16() -> Preset:
    """ViT-B/16, the smallest of the released ones: 111,655,680 parameters."""
    return paper().but(**{"config.encoder.body": tower(768, 12, 12)})
