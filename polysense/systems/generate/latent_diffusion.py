"""Latent diffusion: text to image, by removing noise in a small latent space (Stable Diffusion).

An auto-encoder first learns a space of f x f times fewer places in which pictures lose next to nothing a person would see: E(x) is the mean and
the log-variance of z, and

    L_1 = (|x - D(z)| + d(x, D(z))) / exp(s) + s + 1e-6 KL(E(x) || N(0, I)) + lambda * critic,    z ~ E(x), s learned   (appendix G, equation 25)

with the distance d that a trained network sees (LPIPS), a critic of patches that joins late, and lambda the ratio of both terms' gradients at the
decoder's last layer (Esser et al. 2021). The network of d comes from a trained VGG or from published files (`perceptual_files`); `tiny` has neither
d nor critic, and squares in place of |.|. Then the auto-encoder is frozen. A U-Net learns to take noise from z, scaled to unit deviation, while it
reads the caption y through cross-attention, whose queries are the places of its maps and whose keys and values are the states tau(y) of a frozen
CLIP text tower (all 77 of them, after the last norm):

    L_2 = || e - eps(A_t z + B_t e, t, tau(y)) ||^2,    e ~ N(0, I)                                                  (equation 3)

One caption in ten is the empty one, so that drawing can weigh words: eps(empty) + w (eps(y) - eps(empty)), w = 7.5. A moving average of the
U-Net draws. `LatentDiffusion.steer` is the hook through which ControlNet and others put their hand in.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.archetypes import stable_diffusion as versions
from polysense.archetypes.latent_diffusion import LatentDiffusion
from polysense.archetypes.stable_diffusion import PARAMETERS, TINY_WORDS, WORDS, pictures, tiny_base, version_1, version_2
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Losses, Optim, Preset, Spec, Stage, Start, TextPlan, final
from polysense.decoders.kl_vae import kl_to_normal
from polysense.decoders.patch_critic import PatchCritic, balance, hinge
from polysense.decoders.perceptual import Perceptual
from polysense.weights import latent_diffusion as layouts
from polysense.weights import ldm_text2im
from polysense.weights.lpips import load_perceptual

__all__ = ["PARAMETERS", "StableDiffusion"]

card = Card(
    name="Latent diffusion", paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, CVPR 2022",
    arxiv="2112.10752", year=2022, says="Draws pictures from words, in a small latent space.",
    needs=("image", "text"), can=("generate_image", "reconstruct"), official="CompVis/stable-diffusion",
)

APART = {"absolute": torch.abs, "squares": torch.square}

weights = {"diffusers": layouts.DIFFUSERS, "original": layouts.ORIGINAL, "text2im": ldm_text2im.LAYOUT}


@final
class StableDiffusion(LatentDiffusion):
    @dataclass(frozen=True, kw_only=True)
    class Config(LatentDiffusion.Config):
        apart: str = "absolute"              # how pixels differ: "absolute", or "squares", by which a short run learns small things sooner
        perceptual: Spec | None = None       # a Perceptual, for the auto-encoder; None: its loss has no such term
        perceptual_weight: float = 1.0
        perceptual_files: tuple[str, ...] = ()               # LPIPS as published, read once before training; (): as the Start left it
        critic: Spec | None = None           # a PatchCritic, for the auto-encoder
        critic_from: int = 50_001            # step at which it joins
        critic_weight: float = 0.5           # beside the balance of gradients

    met: Tensor                              # [] steps of the auto-encoder

    def __init__(self, c: Config):
        super().__init__(c)
        self.log_noise = nn.Parameter(torch.zeros(()))       # s
        self.perceptual, self.critic = (p.build() if p is not None else None for p in (c.perceptual, c.critic))
        self.perceptual_config, self.perceptual_weight, self.perceptual_files = c.perceptual, c.perceptual_weight, c.perceptual_files
        if c.perceptual_files and c.perceptual is None:
            raise UserError("perceptual_files without a perceptual network", "give config.perceptual as well, or train the preset `autoencoder`")
        if c.apart not in APART:
            raise UserError(f"apart={c.apart!r}", f"it is {' or '.join(APART)}")
        self.apart = APART[c.apart]
        self.critic_from, self.critic_weight, self.measured = c.critic_from, c.critic_weight, c.scale is None
        self.register_buffer("met", torch.zeros(()), persistent=c.critic is not None)

    def after_start(self) -> None:
        """Where files of the perceptual network are named, they take the place of what it was born with."""
        if self.perceptual is not None and self.perceptual_files:
            load_perceptual(self.perceptual, self.perceptual_config, *self.perceptual_files)

    def compress(self, batch: Batch) -> Losses:
        """L_1 of the auto-encoder, and where there is a critic what it minimises itself; gradients of both stay apart."""
        x = batch["image"]
        mean, log = self.vae.moments(x)
        z = mean + (0.5 * log).exp() * torch.randn_like(mean)
        drawn = self.vae.decode(z)
        off = self.apart(x - drawn).mean()
        if self.perceptual is not None:
            off = off + self.perceptual_weight * self.perceptual(x, drawn).mean()
        detail = off / self.log_noise.exp() + self.log_noise
        losses = Losses(detail=detail, kl=kl_to_normal(mean, log).sum() / x.numel())
        if self.critic is not None:
            fooled = -self.critic.looked_at(drawn).mean()
            on = (self.met >= self.critic_from).float()
            losses["fooled"] = on * self.critic_weight * balance(detail, fooled, self.vae.decoder.conv_out.weight) * fooled
            losses["critic"] = on * hinge(self.critic(x), self.critic(drawn.detach()))
        return losses.keeping(spread=z.std())

    def losses(self, batch: Batch) -> Losses:
        """L_2 of the U-Net."""
        return Losses(noise=self.noise_error(batch["image"], batch["text"]))

    def after_step(self, after: After) -> None:
        """While the auto-encoder trains, the scale follows 1 / deviation of its latents, where it is to be measured."""
        if "spread" in after.keep:
            self.met += 1
            if self.measured:
                now = 1 / after.keep["spread"].float().clamp_min(1e-6)
                self.scale.copy_(now if after.step == 1 else torch.lerp(self.scale, now, 0.1))


def tiny() -> Preset:
    """2.9M parameters in the U-Net; the text tower is that of `clip` tiny."""
    return Preset(
        data="scenes:single?style=plain&size=32", feed=pictures(32, TINY_WORDS), starts=(Start(into="text", from_="clip", take="text"),),
        config=StableDiffusion.Config(**tiny_base(), apart="squares"),
        stages=(Stage(name="compress", objective=StableDiffusion.compress, trainable=("vae.*", "log_noise"), weights=(("kl", 1e-4),), steps=600,
                      batch_size=48, optim=Optim(lr=2e-3, warmup=30, clip=1.0)),
                Stage(name="denoise", objective=StableDiffusion.losses, trainable=("unet.*",), steps=1500, batch_size=64, ema=0.995,
                      optim=Optim(lr=1e-3, weight_decay=0.01, warmup=50, clip=1.0))))


def paper() -> Preset:
    """Stable Diffusion 1: 512 px on an auto-encoder that is trained already, 225,000 steps on LAION-aesthetics after 256 px."""
    return Preset(
        data="laion_aesthetics", config=StableDiffusion.Config(**version_1()), feed=pictures(512, WORDS, flip=0.5),
        starts=(Start(into="text", from_="clip", take="text", preset="paper"),),
        stages=(Stage(name="denoise", objective=StableDiffusion.losses, trainable=("unet.*",), steps=225_000, batch_size=2048, ema=0.9999,
                      optim=Optim(lr=1e-4, weight_decay=0.01, schedule="constant", warmup=10_000)),))


def version2() -> Preset:
    """Stable Diffusion 2: 290,000 steps at 768 px with velocities as target, on the base at 512 px (its model card). Released beside it are bases
    that say the noise: for those set config.predict="noise" and config.size=512. The words' tower, OpenCLIP ViT-H without its last block and
    head, comes with the released files."""
    base = paper()
    return base.but(data="laion_5b", config=StableDiffusion.Config(**version_2()), starts=(), feed=pictures(768, WORDS.but(pad="zero"), flip=0.5),
                    stages=(base.stages[0].but(steps=290_000),))


def text2im() -> Preset:
    """The paper's own text-to-image model (LDM-KL-8): 256 px on LAION-400M, 390,000 steps of batch 680 (table 15); U-Net and text tower learn
    together."""
    base = paper()
    return base.but(data="laion400m", config=StableDiffusion.Config(**versions.text2im()), starts=(), stages=(
        base.stages[0].but(trainable=("unet.*", "text.*"), steps=390_000, batch_size=680),),
        feed=pictures(256, TextPlan(kind="wordpiece", vocab=30_522, length=77, pad="zero"), flip=0.5))


def autoencoder() -> Preset:
    """Its auto-encoder, f = 8 and c = 4, at 256 px with LPIPS on VGG-16 and the critic from step 50,001 on.

    Without published files the distance is that of this library's own VGG, every channel counting alike."""
    base = paper()
    return base.but(data="openimages", config=base.config.but(size=256, scale=None, perceptual=Perceptual.Config(), critic=PatchCritic.Config()),
                    starts=(Start(into="perceptual", from_="vgg", take="backbone", preset="paper"),), stages=(
        Stage(name="compress", objective=StableDiffusion.compress, trainable=("vae.*", "log_noise", "critic.*"), weights=(("kl", 1e-6),),
              steps=500_000, batch_size=12, optim=Optim(name="adam", lr=4.5e-6 * 12, betas=(0.5, 0.9), schedule="constant")),)).but(
        **{"feed.image.size": 256, "feed.train_image.size": 256})
