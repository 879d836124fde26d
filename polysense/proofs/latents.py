"""What proofs of latent diffusion share: an auto-encoder trained once, every picture's latents kept, and a U-Net that learns from those.

In training a picture is encoded again at every visit though the auto-encoder is frozen; where minutes count, that is most of them.
"""
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polysense.base.system import Part, Preset, Spec, System
from polysense.data.sources import Source
from polysense.decoders.kl_vae import KLVAE
from polysense.pipeline import Pipeline
from polysense.proofs.arms import train_arm
from polysense.proofs.pool import batches, drawn_once


class Kept(Part):
    """An auto-encoder that takes moments kept before, [B,2Z,h,w] (mean and log-variance), in the place of a picture: they are drawn from as usual."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vae: KLVAE.Config

        @property
        def stride(self) -> int:
            return self.vae.stride

        @property
        def latents(self) -> int:
            return self.vae.latents

    def __init__(self, c: Config):
        super().__init__()
        self.inner, self.stride, self.latents = c.vae.build(), c.stride, c.latents

    @property
    def scale(self) -> Tensor:
        return self.inner.scale

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if image.shape[1] == 2 * self.latents:
            mean, log = image.chunk(2, 1)
            return mean, log
        return self.inner.moments(image)

    def encode(self, image: Tensor) -> Tensor:
        mean, log = self.moments(image)
        return mean + (0.5 * log).exp() * torch.randn_like(mean)

    def decode(self, z: Tensor) -> Tensor:
        return self.inner.decode(z)


def standing(preset: Preset) -> Preset:
    """The preset with its auto-encoder as one that also takes what was kept."""
    return preset.but(config=replace(preset.config, vae=Kept.Config(vae=preset.config.vae)))


def compressed(preset: Preset, whole: dict[str, Tensor], train: Source, seed: int, tokenizer: Any) -> tuple[Pipeline, dict[str, Tensor]]:
    """The first stage of a preset trained on pictures [N,3,H,W] in memory, and its moments [N,2Z,h,w] in the pictures' place in `whole`."""
    stage = preset.stages[0]
    shown = batches({"image": whole["image"]}, stage.batch_size, seed)
    first = train_arm("latent_diffusion", preset.but(stages=(stage,)), train, needs=("image",), seed=seed, tokenizer=tokenizer, batches=shown).subject
    with torch.inference_mode():
        kept = torch.cat([torch.cat(first.system.vae.moments(x), 1) for x in whole["image"].split(200)])  # type: ignore[union-attr,operator]
    return first, {**whole, "image": kept.clone()}


def lend(learned: System) -> Any:
    """`prepare` for train_arm: everything that both systems have, the auto-encoder also into one that takes what was kept."""
    state = learned.state_dict()
    state |= {name.replace("vae.", "vae.inner.", 1): v for name, v in state.items() if name.startswith("vae.") and not name.startswith("vae.inner.")}

    def prepare(system: System) -> None:
        own = system.state_dict()
        system.load_state_dict({k: v for k, v in state.items() if k in own and v.shape == own[k].shape}, strict=False)
    return prepare


def all_of(train: Source, preset: Preset, tokenizer: Any, *more: str) -> dict[str, Tensor]:
    """Pictures, captions and what else is named of a whole source, read once."""
    return drawn_once(train, preset.feed, tokenizer, ("image", "text", *more))
