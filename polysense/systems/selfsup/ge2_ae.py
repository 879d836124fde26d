"""Ge2-AE: a masked autoencoder that draws the hidden parts twice, as pixels and as frequencies, and holds each drawing to both.

As in MAE, a quarter of the patches passes the encoder. Over its output stand two decoders: the pixel decoder (PD) says the pixels of every patch, the
frequency decoder (FD) the two-dimensional spectrum F of the picture (real and imaginary parts, orthonormal, frequency zero in the middle), its tokens
standing for squares of frequencies as the other's do for squares of pixels:

    L = MSE_hidden(PD, x) + l1 FFL(FD, F(x)) + l2 FFL(F(PD), F(x)) + l3 MSE_hidden(F^-1(FD), x)                   (section 3.3)
    FFL(G, F) = mean over (u, v) of w |G - F|^2,   w = |G - F|^alpha, scaled to [0, 1], without a gradient

Pixels are judged where they were hidden, spectra as a whole: a hidden patch has a part in every frequency. The weight w is what makes the second
domain worth having: without it the spectra's error is, by Parseval's theorem, that of the pixels. Only the encoder is kept.
"""
from dataclasses import dataclass

from polysense.archetypes.masked_model import MaskedPictures
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, ViewPlan, final
from polysense.decoders.geminate import Geminated, GeminateTarget
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.nn.block import PreNorm
from polysense.nn.init import XavierInit
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.spectrum import geminated
from polysense.towers.vit import ViT

card = Card(
    name="Ge2-AE",
    paper="Liu et al., The Devil is in the Frequency: Geminated Gestalt Autoencoder for Self-Supervised Visual Pre-Training, AAAI 2023",
    arxiv="2204.08227", year=2023, says="Learns pictures without labels by drawing what is hidden as pixels and as frequencies.",
    needs=("image",), can=("encode_image", "reconstruct"),
)

PARAMETERS = 138_057_984                     # ViT-B/16 85.6M and two decoders 8x512 of 26.0M and 26.4M; no total is published

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class Ge2AE(MaskedPictures):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedPictures.Config):
        alpha: float = 1.0                   # of the focal weight

    def __init__(self, c: Config):
        super().__init__(c)
        self.alpha = c.alpha

    def losses(self, batch: Batch) -> Losses:
        """pixels, frequency, and each drawing in the other's terms; the stage says l1, l2 and l3."""
        image = batch["image"]
        return Losses(**geminated(*self.pairs(image, self.masking(image)), self.alpha))


def lambdas(frequency: float, pixels_in_frequency: float, frequency_in_pixels: float) -> tuple[tuple[str, float], ...]:
    """Stage weights; with zeros it is MAE."""
    return (("frequency", frequency), ("pixels_in_frequency", pixels_in_frequency), ("frequency_in_pixels", frequency_in_pixels))


def tower(width: int, depth: int, heads: int) -> Transformer.Config:
    norm = LayerNorm.Config(eps=1e-6)
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=norm, init=XavierInit.Config(), block=PreNorm.Config(norm=norm))


def preset(size: int, patch: int, encoder: Transformer.Config, decoder: Transformer.Config, data: str, stage: Stage) -> Preset:
    return Preset(
        data=data, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), train_image=ViewPlan(size=size, scale=(0.2, 1.0), flip=0.5)),
        config=Ge2AE.Config(
            encoder=ViT.Config(image_size=size, patch=patch, body=encoder, pool="mean", position="sincos"), sampler=RandomMask.Config(ratio=0.75),
            decoder=Geminated.Config(patch=patch, pixel=decoder, frequency=decoder), target=GeminateTarget.Config(patch=patch)))


def tiny() -> Preset:
    return preset(64, 8, tower(128, 4, 4), tower(96, 2, 3), "scenes", Stage(
        objective=Ge2AE.losses, weights=lambdas(1.0, 1.0, 1.0), steps=600, batch_size=128,
        optim=Optim(lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=60, clip=1.0)))


def paper() -> Preset:
    """ViT-B/16 on ImageNet-1k, 800 epochs with MAE's plan; the sizes of the decoders and the weights of the terms are not given."""
    epoch = 1_281_167 // 4096
    return preset(224, 16, tower(768, 12, 12), tower(512, 8, 16), "imagenet1k", Stage(
        objective=Ge2AE.losses, weights=lambdas(1.0, 1.0, 1.0), steps=800 * epoch, batch_size=4096,
        optim=Optim(lr=1.5e-4 * 4096 / 256, betas=(0.9, 0.95), weight_decay=0.05, warmup=40 * epoch)))
