"""Text to image in a small latent space. Abstract: draws, and says how far its noise is off; leaves open what is trained and on what.

Shapes: B batch, L tokens, D their width, Z latent channels, h w latent places.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.denoiser import Denoiser
from polysense.base.errors import UserError
from polysense.base.system import Batch
from polysense.decoders.kl_vae import KLVAE
from polysense.nn.unet import UNet
from polysense.objectives.diffusion import guided
from polysense.towers.clip_text import ClipText


class LatentDiffusion(Denoiser):
    """`vae`, `unet` and `text` (Rombach et al. 2022). The hook `steer` is where systems that stand on this one put their hand in."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Denoiser.Config):
        vae: KLVAE.Config
        unet: UNet.Config
        text: ClipText.Config
        size: int                            # side of the pictures that it draws, pixels
        scale: float | None = None           # what latents are multiplied by, 1 / their deviation; None: measured while the auto-encoder trains
        drop: float = 0.1                    # share of captions that training replaces by the empty one
        guidance: float = 7.5
        pad: int | None = None               # id behind the end of a text; None: the end again (Stable Diffusion 1)

    hears: tuple[str, ...] = ()              # what `control` may hold beside guidance, negative and noise

    def __init__(self, c: Config):
        super().__init__(c)
        self.vae, self.unet, self.text = c.vae.build(), c.unet.build(), c.text.build()
        self.size, self.drop, self.guidance, self.pad = c.size, c.drop, c.guidance, c.pad
        self.word: Tensor | None = None      # [N,D] embeddings of words learned later, behind the vocabulary (textual inversion)
        if c.size % (c.vae.stride * self.unet.factor) or c.unet.channels < c.vae.latents:
            raise UserError(f"pictures of {c.size} pixels, latents of {c.vae.latents} channels",
                            f"the size is a multiple of {c.vae.stride * self.unet.factor}, and the U-Net reads {c.unet.channels} channels")
        if c.scale is not None:
            self.vae.scale.fill_(c.scale)

    @property
    def scale(self) -> Tensor:
        """[] what latents are multiplied by."""
        return self.vae.scale

    # words

    def whole(self, text: Tensor) -> Tensor:
        """text [B,L] -> [B,length]: every text takes the tower's whole length, padding is read like words (no mask), as released weights do."""
        fill = self.text.length - text.shape[1]
        if fill <= 0:
            return text
        end = text.gather(1, self.text.last(text)[:, None]) if self.pad is None else text.new_full((len(text), 1), self.pad)
        return torch.cat([text, end.expand(-1, fill)], 1)

    def empty(self, text: Tensor) -> Tensor:
        """text [B,L] -> ids of as many empty captions: each text's own start, then its end."""
        return torch.cat([text[:, :1], text.gather(1, self.text.last(text)[:, None])], 1)

    def context(self, text: Tensor) -> Tensor:
        """tau(y): text [B,L] -> all states of the text tower after its last norm, [B,length,D]."""
        return self.text(self.whole(text), new=self.word).tokens

    def dropped(self, text: Tensor, share: float | None = None) -> Tensor:
        """text [B,L], each with chance `share` (None: the preset's) the empty caption: what guidance needs to have seen (Ho & Salimans 2022)."""
        share = self.drop if share is None else share
        gone = torch.rand(len(text), 1, device=text.device) < share
        return torch.where(gone, self.whole(self.empty(text)), self.whole(text)) if share else text

    # pictures

    def latents(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> scaled latents [B,Z,h,w], drawn; without a graph."""
        with torch.no_grad():
            return self.vae.encode(image) * self.scale

    def picture(self, z: Tensor) -> Tensor:
        """scaled latents [B,Z,h,w] -> image [B,3,H,W]."""
        return self.vae.decode(z / self.scale)

    def reconstruct(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> what the auto-encoder keeps of it, [B,3,H,W]."""
        return self.vae.decode(self.vae.moments(image)[0])

    # noise

    def steer(self, control: Batch, z: Tensor, t: Tensor, context: Tensor) -> dict[str, object]:
        """The hook: further arguments of the U-Net (`add`: residuals of its skips; `extra`: beside the time), or a `z` or `context` in place of
        the given ones. Called once for every look of the U-Net; while drawing with guidance the first half of the batch is without words, and
        `control` holds `worded` [2B], which says so."""
        return {}

    def says(self, control: Batch, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The U-Net's prediction [B,Z,h,w] at z, t [B], context [B,S,D], steered."""
        given: dict[str, object] = {"z": z, "context": context} | self.steer(control, z, t, context)
        return self.unet(given.pop("z"), t, given.pop("context"), **given)

    def noise_error(self, image: Tensor, text: Tensor, control: Batch | None = None, drop: float | None = None) -> Tensor:
        """|| e - eps(z_t, t, tau(y)) ||^2 of pictures [B,3,H,W] and their captions [B,L], some of them dropped. Scalar (equation 3)."""
        context = self.context(self.dropped(text, drop))
        return self.missed(self.latents(image), lambda z, t: self.says(control or {}, z, t, context))

    def generate_image(self, text: Tensor, *, steps: int, **control: Tensor) -> Tensor:
        """text [B,L] -> images [B,3,size,size], about in [-1,1]; latents from torch's random numbers.

        control: `guidance` [] (1: none), `negative` [B,L] ids in place of the empty caption, `noise` [B,Z,h,w] to begin with, and what
        the system `hears`: what has two axes or more and as many rows as there are texts belongs to them row by row, a number or a vector
        to all. Raises UserError for anything else.
        """
        if unknown := sorted(set(control) - {"guidance", "negative", "noise", *self.hears}):
            raise UserError(f"{type(self).__name__} does not hear {unknown[0]!r}",
                            f"it hears guidance, negative, noise{''.join(f', {h}' for h in self.hears)}")
        side = self.size // self.vae.stride
        given = dict(control)
        scale, negative, noise = given.pop("guidance", torch.tensor(self.guidance)), given.pop("negative", None), given.pop("noise", None)
        with torch.no_grad():
            z = torch.randn(len(text), self.vae.latents, side, side, device=self.device) if noise is None else noise
            context = self.context(text)
            weight = float(scale)
            if weight != 1.0:
                context = torch.cat([self.context(self.empty(text) if negative is None else negative).expand_as(context), context])
                given = {k: torch.cat([v, v]) if v.ndim > 1 and len(v) == len(text) else v for k, v in given.items()}
                given["worded"] = torch.arange(2 * len(text), device=z.device) >= len(text)

            def predict(z: Tensor, t: Tensor) -> Tensor:
                if weight == 1.0:
                    return self.says(given, z, t, context)
                free, told = self.says(given, torch.cat([z, z]), torch.cat([t, t]), context).chunk(2)
                return guided(free, told, weight)

            return self.picture(self.drawn(z, predict, steps))
