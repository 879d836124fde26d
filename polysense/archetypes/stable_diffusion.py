"""The shapes of Stable Diffusion 1 and 2 and of their toy, for every system that stands on their weights; values, no classes."""
from typing import Any

from polysense.archetypes.denoiser import Sampler
from polysense.base.system import Feed, ImagePlan, Start, TextPlan, ViewPlan
from polysense.decoders.kl_vae import KLVAE
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.mlp import MLP
from polysense.nn.norm import GroupNorm
from polysense.nn.spatial import ResBlock, SpatialTransformer
from polysense.nn.transformer import Transformer
from polysense.nn.unet import Level, UNet
from polysense.towers.clip import body, tiny_pair
from polysense.towers.clip_text import ClipText
from polysense.towers.open_text import OpenText

PARAMETERS = 859_520_964 + 83_653_863 + 123_060_480          # of version 1: U-Net, auto-encoder, CLIP's text tower
PARAMETERS_2 = 865_910_724 + 83_653_863 + 340_387_840        # of version 2
PARAMETERS_LDM = 872_300_484 + 83_653_863 + 542_895_360      # of the first text-to-image model: U-Net, auto-encoder, its own text tower
WORDS, TINY_WORDS = TextPlan(vocab=49408, length=77), TextPlan(vocab=4096, length=48)


def unet(widths: tuple[int, ...], seeing: tuple[int, ...], source: int, *, channels: int = 4, depth: int = 2, heads: int = 8,
         groups: int = 32, head_width: int = 0, join: str = "conv") -> UNet.Config:
    """A U-Net that reads a context of width `source` at the levels `seeing` and in the middle. head_width: in place of a number of heads."""
    def attn(width: int) -> SpatialTransformer.Config:
        return SpatialTransformer.Config(heads=width // head_width if head_width else heads, source=source, join=join,
                                         norm=GroupNorm.Config(groups=groups, eps=1e-6))
    return UNet.Config(levels=tuple(Level(width=w, depth=depth, attn=attn(w) if i in seeing else None) for i, w in enumerate(widths)),
                       mid=attn(widths[-1]), channels=channels, block=ResBlock.Config(norm=GroupNorm.Config(groups=groups, eps=1e-5)))


def tiny_base(**change: Any) -> dict[str, Any]:
    """Fields of a LatentDiffusion.Config, some of them changed or added: 32 px, f = 4, latents of 8x8x4, the words of `clip` tiny."""
    text = tiny_pair()["text"]
    return {"vae": KLVAE.Config(widths=(24, 32, 48), depth=1, norm=GroupNorm.Config(groups=8, eps=1e-6)),
            "unet": unet((64, 96), (0, 1), text.width, depth=1, heads=4, groups=16), "text": text, "size": 32, "schedule": "scaled_linear",
            "low": 8.5e-4, "high": 0.012, "clip": None, "guidance": 4.0, "sampler": Sampler(name="ddim"), **change}


def version_1(**change: Any) -> dict[str, Any]:
    """The same of Stable Diffusion 1: 512 px, f = 8, latents of 64x64x4, CLIP ViT-L/14's words."""
    return {"vae": KLVAE.Config(widths=(128, 256, 512, 512)), "unet": unet((320, 640, 1280, 1280), (0, 1, 2), 768),
            "text": ClipText.Config(vocab=49408, length=77, body=body(768, 12, 12)), "size": 512, "scale": 0.18215, "schedule": "scaled_linear",
            "low": 8.5e-4, "high": 0.012, "clip": None, "sampler": Sampler(name="plms", offset=1, last="first"), **change}


def version_2(**change: Any) -> dict[str, Any]:
    """The same of Stable Diffusion 2: 768 px, the U-Net says the velocity, and reads OpenCLIP ViT-H's words behind all of its blocks but the last."""
    return {**version_1(), "unet": unet((320, 640, 1280, 1280), (0, 1, 2), 1024, head_width=64, join="linear"), "size": 768, "predict": "velocity",
            "text": ClipText.Config(vocab=49408, length=77, body=body(1024, 23, 16, act="gelu")), "pad": 0,
            "sampler": Sampler(name="ddim", offset=1, last="first"), **change}


def text2im(**change: Any) -> dict[str, Any]:
    """The same of the first one: 256 px, latents of 32x32x4, and a text tower of its own over word pieces, 32 blocks that see both ways, whose heads
    are narrow (8 of 64 numbers at a width of 1280); it learns with the U-Net."""
    block = PreNorm.Config(attn=Attention.Config(bias="out", head_width=64), mlp=MLP.Config(hidden=5120))
    return {**version_1(), "unet": unet((320, 640, 1280, 1280), (0, 1, 2), 1280), "size": 256, "pad": 0,
            "sampler": Sampler(name="ddim", offset=1, last="first"), "text": OpenText.Config(
                vocab=30_522, length=77, body=Transformer.Config(width=1280, depth=32, heads=8, block=block)), **change}


def pictures(size: int, words: TextPlan, flip: float = 0.0) -> Feed:
    """Pictures of one size in [-1,1] with their captions."""
    return Feed(image=ImagePlan(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), text=words,
                train_image=ViewPlan(size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip))


def standing_on(preset: str) -> tuple[Start, ...]:
    """U-Net, auto-encoder and words of a trained latent diffusion model."""
    return tuple(Start(into=part, from_="latent_diffusion", take=part, preset=preset) for part in ("unet", "vae", "text"))
