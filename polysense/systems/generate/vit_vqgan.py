"""ViT-VQGAN: a picture as code numbers, by transformers alone, with a codebook all of whose codes are in use.

Encoder and decoder are ViTs over 8x8 patches; what leaves either passes two layers with tanh between them (section 3.1). Two changes keep codes alive
(section 3.2):

    factorised    the search happens in 32 dimensions, whatever the width D: z = W_down h, decoder input W_up e_k
    normalised    k = argmin_j || z/|z| - e_j/|e_j| || = argmax_j cos(z, e_j), and e_k/|e_k| goes on

    L = L_VQ + 0.1 L_laplace + 1.0 ||x - x'||^2 + 0.1 d(x, x') + 0.1 L_adv,   L_VQ = ||sg(z) - e||^2 + 0.25 ||z - sg(e)||^2 of unit vectors

L_laplace is -log density of the logit-Laplace distribution around x' (Ramesh et al. 2021), with one learned scale a colour; d the distance that a
network sees (LPIPS); L_adv asks a StyleGAN2 discriminator, logistic and without a gradient penalty. Both terms of pixels are of values in [0,1].

Stage 2 is a causal transformer over the ids in raster order, behind a start token or behind the class. It draws, and it represents: the mean over
the tokens of a layer about a third of the way up is the feature of the picture (section 3.3).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.adversarial_codec import AdversarialCodec
from polysense.archetypes.generator import alternate
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, Start, ViewPlan, final
from polysense.decoders.code_writer import CodeWriter
from polysense.decoders.perceptual import Perceptual, vgg_rows
from polysense.decoders.style_critic import StyleCritic
from polysense.decoders.vit_codec import CosineQuantizer, ViTDecoder, ViTEncoder
from polysense.decoders.vq_codec import VQCodec
from polysense.nn.head import TanhHead
from polysense.nn.transformer import Transformer
from polysense.objectives.codes import codebook_loss, commitment_loss, logit_laplace, map_pixels, masked_ce
from polysense.weights import vit_vqgan as layouts

card = Card(
    name="ViT-VQGAN", paper="Yu et al., Vector-quantized Image Modeling with Improved VQGAN, ICLR 2022",
    arxiv="2110.04627", year=2022, says="Turns a picture into codes by transformers, all codes in use, and writes and represents pictures by them.",
    needs=("image",), can=("encode_image", "sample_image", "reconstruct", "encode_codes", "decode_codes"),
)

PARAMETERS = 927_813_732                     # codec 177.5M (88.5M of it the encoder), critic 28.9M, VGG-16 14.7M, stage 2 706.7M; no published total

weights = {"enhancing": layouts.ENHANCING}


@final
class ViTVQGAN(AdversarialCodec):
    @dataclass(frozen=True, kw_only=True)
    class Config(AdversarialCodec.Config):
        codec: VQCodec.Config
        prior: CodeWriter.Config
        form: str = "log"
        perceptual_weight: float = 0.1
        critic_weight: float = 0.1
        laplace: float = 0.1                 # weight of the logit-Laplace likelihood
        beta: float = 0.25
        look: int = 0                        # layer of stage 2 whose mean is the feature; 0: a third of the way up

    def __init__(self, c: Config):
        super().__init__(c)
        depth = c.prior.body.depth
        if not 0 <= c.look <= depth:
            raise UserError(f"look={c.look}", f"the transformer over the codes has the layers 1 to {depth}")
        self.critic_weight, self.laplace, self.beta, self.look = c.critic_weight, c.laplace, c.beta, c.look or max(1, round(depth / 3))

    def rebuild(self, batch: Batch) -> tuple[Losses, Tensor]:
        image = batch["image"]
        drawn, encoded, quantized = self.codec(image)
        unit, (pixels, made) = F.normalize(encoded, dim=-1), (v / 2 + 0.5 for v in (image, drawn))
        pixels = pixels.clamp(0, 1)                                                  # resampling overshoots; beyond, the density is not defined
        around = torch.logit(map_pixels(made.clamp(0, 1)))
        losses = Losses(
            codebook=codebook_loss(unit, quantized.vectors), commit=self.beta * commitment_loss(unit, quantized.vectors),
            laplace=self.laplace * logit_laplace(map_pixels(pixels), around, self.codec.decoder.log_scale[:, None, None]).mean(),
            squares=F.mse_loss(made, pixels),
            perceptual=self.perceptual_weight * self.perceptual(image, drawn).mean())
        return losses.keeping(encoded=encoded, ids=quantized.ids), drawn

    def weigh(self, losses: Losses, fooled: Tensor) -> Tensor:
        return fooled.new_tensor(self.critic_weight)

    def fit_prior(self, batch: Batch) -> Losses:
        """-log p(codes), nats a code, on the grids of the frozen codec; behind its class where the prior knows classes."""
        with torch.no_grad():
            ids = self.codec.ids(batch["image"])
        return Losses(codes=masked_ce(self.prior(ids, batch["label"][:, None] if self.prior.kinds > 1 else None), ids))

    @torch.no_grad()
    def sample_image(self, count: int, *, steps: int) -> Tensor:
        """New pictures [count,3,H,W], of random classes where the prior knows some. steps: not used, there is one code after the other."""
        kinds = self.prior.kinds
        front = torch.randint(kinds, (count, 1), device=self.device) if kinds > 1 else None
        return self.codec.decode(self.prior.sample(count, front))

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], the mean of a middle layer of stage 2, of unit length; behind the first class where it knows some."""
        ids = self.codec.ids(image)
        front = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device) if self.prior.kinds > 1 else None
        return F.normalize(self.prior.features(ids, self.look, front).float(), dim=-1)


def body(width: int, depth: int, heads: int) -> Transformer.Config:
    return Transformer.Config(width=width, depth=depth, heads=heads)


def codec(size: int, patch: int, encoder: Transformer.Config, decoder: Transformer.Config, codes: int = 8192, dim: int = 32) -> VQCodec.Config:
    n, pixels = size // patch, 3 * patch ** 2
    return VQCodec.Config(
        encoder=ViTEncoder.Config(patch=patch, side=n, body=encoder, code=dim, project=TanhHead.Config(
            into=encoder.width, hidden=4 * encoder.width, out=dim)),
        quantizer=CosineQuantizer.Config(codes=codes, width=dim),
        decoder=ViTDecoder.Config(patch=patch, side=n, body=decoder, code=dim, project=TanhHead.Config(
            into=decoder.width, hidden=4 * decoder.width, out=pixels)))


LEARNS = ("codec.*", "critic.*")


def feed(size: int, scale: tuple[float, float]) -> Feed:
    half = (0.5, 0.5, 0.5)
    return Feed(image=ImagePlan(size=size, mean=half, std=half), train_image=ViewPlan(size=size, scale=scale, flip=0.5))


def tiny() -> Preset:
    """32 px to 8x8 codes of 256 in 8 dimensions. The critic joins behind the first stage; the perceptual network is the VGG of `vgg` tiny."""
    optim = Optim(lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4, warmup=30, clip=1.0, final=0.1)
    of = body(96, 3, 4)
    return Preset(
        data="scenes", feed=feed(32, (0.9, 1.0)), starts=(Start(into="perceptual", from_="vgg", take="backbone"),),
        config=ViTVQGAN.Config(codec=codec(32, 4, of, of, 256, 8), prior=CodeWriter.Config(codes=256, side=8, body=body(96, 3, 4)),
                               critic=StyleCritic.Config(size=32, widths=(8, 16, 32, 32)),
                               perceptual=Perceptual.Config(rows=vgg_rows((1, 1, 2, 2, 2), base=8), seen=(0, 1, 3, 5, 7))),
        stages=(Stage(name="codec", objective=ViTVQGAN.compress, trainable=("codec.*",), steps=500, batch_size=16, optim=optim),
                Stage(name="sharpen", objective=ViTVQGAN.losses, run=alternate, trainable=LEARNS, steps=150, batch_size=16,
                      optim=optim.but(lr=3e-4, schedule="constant")),
                Stage(name="prior", objective=ViTVQGAN.fit_prior, trainable=("prior.*",), steps=400, batch_size=32,
                      optim=Optim(lr=1e-3, betas=(0.9, 0.96), weight_decay=0.01, warmup=20, clip=1.0))))


def paper() -> Preset:
    """Base: 12 layers of 768 on both sides, 256 px to 32x32 codes of 8,192; stage 2 is VIM-base, 24 layers of 1,536, of ImageNet's classes."""
    of, plan = body(768, 12, 12), Optim(lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4, warmup=10_000, final=0.5)
    return Preset(
        data="imagenet1k", feed=feed(256, (0.5, 1.0)), starts=(Start(into="perceptual", from_="vgg", take="backbone", preset="paper"),),
        config=ViTVQGAN.Config(codec=codec(256, 8, of, of), prior=CodeWriter.Config(codes=8192, side=32, body=body(1536, 24, 16)),
                               critic=StyleCritic.Config(size=256, widths=(128, 256, 512, 512, 512, 512, 512)), perceptual=Perceptual.Config()),
        stages=(Stage(name="codec", objective=ViTVQGAN.losses, run=alternate, trainable=LEARNS, steps=500_000, batch_size=256, optim=plan),
                Stage(name="prior", objective=ViTVQGAN.fit_prior, trainable=("prior.*",), steps=450_000, batch_size=1024,
                      optim=Optim(lr=4.5e-4, betas=(0.9, 0.96), weight_decay=4.5e-2, warmup=5000, clip=1.0))))


def small() -> Preset:
    """8 layers of 512 on both sides."""
    return paper().but(**{"config.codec": codec(256, 8, body(512, 8, 8), body(512, 8, 8))})


def small_base() -> Preset:
    """A small encoder, which is what stage 2 waits for, and a base decoder."""
    return paper().but(**{"config.codec": codec(256, 8, body(512, 8, 8), body(768, 12, 12))})


def large() -> Preset:
    """32 layers of 1,280 on both sides."""
    return paper().but(**{"config.codec": codec(256, 8, body(1280, 32, 16), body(1280, 32, 16))})
