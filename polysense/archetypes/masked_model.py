"""Hide a part of the input, let the rest say what it was. Abstract: a system adds its objective and is final.

What a recipe fills in (all of them Specs in slots; see mechanisms/mask_sampler.py for the first two):
  encoder   a tower with `grid_of(pixels)` and `tower(pixels, keep=..., fill=...) -> Encoded`, `tower.pooled(pixels)`
  sampler   which patches are hidden: `RandomMask` (MAE), `BlockMask` (BEiT), `TubeMask` (VideoMAE)
  hide      how the encoder is kept from seeing them: `DropHidden` (visible tokens only) or `FillHidden` (mask tokens)
  decoder   `decoder(tokens, masking)`: from the encoder's tokens to predictions for the hidden patches
  target    `target(pixels, masking)`: what they should have been, in the same arrangement; runs without a gradient. Teacher and the normalisation of
            its output are one part: pixels, HOG, a spectrum, codes, features of a frozen tower. One that follows the encoder itself (data2vec,
            CAE) has a Config with `of(encoder)` in place of `build()`, and `refresh(encoder)` and `move(encoder, progress)`
"""
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.system import After, Batch, Losses, Spec, System
from polysense.mechanisms.mask_sampler import DropHidden
from polysense.nn.build import build
from polysense.nn.masking import Masking
from polysense.objectives.masked import masked_cosine


class MaskedModel(System):
    """Encoder, sampler, decoder and target. The objective compares `pairs(pixels, masking)`; `pixels` are pictures or clips, as the tower reads."""

    inputs: tuple[str, ...] = ("image", "video")          # batch keys that the tower reads, where a batch has them

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        encoder: Spec
        sampler: Spec
        decoder: Spec
        target: Spec
        hide: Spec = field(default_factory=DropHidden.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.encoder = c.encoder.build()
        self.sampler, of = c.sampler.build(), getattr(c.target, "of", None)
        self.target: Any = c.target.build() if of is None else of(self.encoder)
        self.hide = build(c.hide, width=getattr(self.encoder, "embedded", self.encoder.width))
        self.decoder: Any = build(c.decoder, into=self.encoder.width, out=getattr(c.target, "width", self.encoder.width),
                                  grid=getattr(self.encoder, "grid", None))

    def masking(self, pixels: Tensor) -> Masking:
        """A new random choice of hidden patches for every sample, from torch's generator."""
        return self.sampler(len(pixels), self.encoder.grid_of(pixels), pixels.device)

    def see(self, pixels: Tensor, masking: Masking) -> Tensor:
        """The encoder's tokens [B,T,D] of pixels whose hidden patches it does not see."""
        return self.hide(self.encoder, pixels, masking)

    def pairs(self, pixels: Tensor, masking: Masking) -> tuple[Any, Any]:
        """(prediction, target) of the hidden patches, tensors, or tuples of them where several things are said; the target has no gradient."""
        with torch.no_grad():
            target = self.target(pixels, masking)
        return self.decoder(self.see(pixels, masking), masking), target

    @torch.no_grad()
    def doubts(self, batch: Batch) -> Iterator[str]:
        """A mask the wrong way round, or one over everything: pixels behind it must not change what the encoder says, those in front must."""
        self.eval()
        for pixels in (v for k, v in batch.items() if k in self.inputs):
            masking, grid = self.masking(pixels), self.encoder.grid_of(pixels)
            covered = masking.mask.view(-1, 1, *grid)                                  # video: [B,1,t,h,w] over [B,T,3,H,W]
            moved = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
            hidden = F.interpolate(covered.float(), moved.shape[2:], mode="nearest") > 0.5
            seen, noise = self.see(pixels, masking), torch.randn_like(moved)
            behind, before = torch.where(shrunk(hidden, getattr(self.encoder, "margin", ())), noise, moved), torch.where(hidden, moved, noise)
            if pixels.ndim == 5:
                behind, before = behind.transpose(1, 2), before.transpose(1, 2)
            if float((self.see(behind, masking) - seen).abs().max()) > 1e-4:
                yield "what lies behind the mask changes what the encoder says: is the mask the wrong way round?"
            elif bool(hidden.all()) or float((self.see(before, masking) - seen).abs().max()) <= 1e-4:
                yield "what the encoder may see does not change what it says: is everything hidden?"

    def after_start(self) -> None:
        """A target that follows the encoder becomes a copy of what the Starts brought."""
        if hasattr(self.target, "refresh"):
            self.target.refresh(self.encoder)

    def after_step(self, after: After) -> None:
        """A target that follows the encoder moves."""
        if hasattr(self.target, "move"):
            self.target.move(self.encoder, after.progress)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels, nothing hidden -> the encoder's pooled feature [B,D], unit norm: what transfer reads."""
        return F.normalize(self.encoder.pooled(pixels).float(), dim=-1)


def shrunk(hidden: Tensor, margin: tuple[int, ...]) -> Tensor:
    """hidden [B,1,F,H,W] less what lies within `margin` (frames, pixels) of the visible: a tower's first convolution may look that far."""
    if not margin:
        return hidden
    times, pixels = margin
    return F.max_pool3d((~hidden).float(), (2 * times + 1, 2 * pixels + 1, 2 * pixels + 1), 1, (times, pixels, pixels)) < 0.5


def aggregated(encoder: Any, aggregate: Any, early: int, image: Tensor, masking: Masking, token: Tensor) -> tuple[Tensor, Tensor]:
    """What an encoder with `token` in place of hidden patches says of a picture, [B,T,D] normed; and what the blocks `aggregate` make of its last
    class token beside the patches of layer `early`, behind the same norm (Peng et al. 2022, BEiT v2, section 3.3)."""
    layers = encoder.body.layers(encoder.embed(image, fill=(masking.mask, token))[0])
    both = torch.cat([layers[-1][:, :1], layers[early][:, 1:]], 1)
    both = aggregate.layers(both, mask=encoder.body.relative(both.shape[1]))[-1]
    return encoder.body.norm(layers[-1]), encoder.body.norm(both)


class MaskedPictures(MaskedModel):
    """Masked models of pictures that draw what they are not shown: the target is a PixelTarget (`paint`, `cover`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        pass

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of all patch tokens (no patch hidden), as fine-tuning reads them."""
        return self.features(image)

    def reconstruct(self, image: Tensor, masking: Masking | None = None) -> Tensor:
        """image [B,3,H,W] -> [B,3,H,W]: the visible patches as they are, the hidden ones as drawn. Nothing of what is hidden is read.

        masking: which are hidden; None: drawn anew from torch's generator.
        """
        masking = masking or self.masking(image)
        drawn = getattr(self.decoder, "pixels", self.decoder)(self.see(image, masking), masking)      # `pixels` where it says more besides
        return self.target.paint(image, masking, drawn, self.encoder.grid_of(image))

    def cover(self, image: Tensor, masking: Masking | None = None) -> Tensor:
        """image [B,3,H,W] -> the same with its hidden patches in the mean colour: what the encoder is shown. Draws as `reconstruct` does."""
        return self.target.cover(image, masking or self.masking(image), self.encoder.grid_of(image))


class MaskedFeatures(MaskedModel):
    """Masked models of pictures that say what another network sees where they see nothing, by cosine (Fang et al. 2023, EVA, section 2.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        return Losses(features=masked_cosine(*self.pairs(image, self.masking(image))))

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the tower's pooled feature, no patch hidden."""
        return self.features(image)
