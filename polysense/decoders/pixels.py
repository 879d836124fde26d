"""Pixels as what a masked model predicts. Shapes: B batch, N patches, K visible, M hidden, P side of a patch, C channels."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.masking import Masking, masking_of
from polysense.nn.patch import patchify, unpatchify

NORMS = ("none", "range", "patch", "channel")


class PixelTarget(Part):
    """The pixels of hidden patches (of clips: cubes), plain or normalised.

    norm "none": as they are. "range": taken back to [0,1] by `mean` and `std`.
    "patch": each patch less its mean, divided by sqrt(variance + 1e-6), over all its values, the variance unbiased
    (He et al. 2022, MAE, section 4, "w/ norm"). "channel": in [0,1] as "range", then each colour channel
    of a cube less its mean, divided by its deviation + 1e-6 (Tong et al. 2022, VideoMAE, released code).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        patch: int
        frames: int = 1                      # of a cube
        channels: int = 3
        norm: str = "none"
        mean: tuple[float, ...] = (0.0,)     # what the feed subtracted and divided by
        std: tuple[float, ...] = (1.0,)

        @property
        def width(self) -> int:
            return self.frames * self.patch ** 2 * self.channels

    def __init__(self, c: Config):
        super().__init__()
        if c.norm not in NORMS:
            raise UserError(f"no norm={c.norm!r} of pixels", f"it is one of {', '.join(NORMS)}")
        self.c = c

    def patches(self, pixels: Tensor) -> Tensor:
        """[B,C,H,W] or [B,T,C,H,W] -> [B,N,frames*P*P*C], not normalised."""
        return patchify(pixels, self.c.patch, self.c.frames)

    def normalised(self, patches: Tensor) -> Tensor:
        """[B,N,frames*P*P*C] -> the same, as the model predicts them."""
        c = self.c
        if c.norm == "patch":
            variance, mean = torch.var_mean(patches, -1, keepdim=True)
            return (patches - mean) / (variance + 1e-6).sqrt()
        if c.norm in ("range", "channel"):
            cubes = patches.unflatten(-1, (-1, c.channels))
            cubes = cubes * cubes.new_tensor(c.std) + cubes.new_tensor(c.mean)
            if c.norm == "range":
                return cubes.flatten(-2)
            deviation, mean = torch.std_mean(cubes, -2, keepdim=True)
            return ((cubes - mean) / (deviation + 1e-6)).flatten(-2)
        return patches

    @torch.no_grad()
    def forward(self, pixels: Tensor, masking: Masking) -> Tensor:
        """-> [B,M,frames*P*P*C], the targets of the hidden patches in the order of `masking.hidden`."""
        return self.normalised(masking.at_hidden(self.patches(pixels)))

    def paint(self, pixels: Tensor, masking: Masking, prediction: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The picture with its hidden patches as predicted [B,M,.]; nothing of what is hidden is read.

        A model of normalised patches says nothing about their brightness and contrast: they get the average ones of the visible patches.
        """
        c, patches = self.c, self.patches(pixels)
        seen = masking.at_visible(patches)
        if c.norm == "patch":
            variance, mean = torch.var_mean(seen, -1)
            prediction = prediction * (variance + 1e-6).sqrt().mean(1)[:, None, None] + mean.mean(1)[:, None, None]
        elif c.norm == "channel":
            deviation, mean = (v.mean(1)[:, None] for v in torch.std_mean(seen.unflatten(-1, (-1, c.channels)), -2, keepdim=True))
            prediction = (prediction.unflatten(-1, (-1, c.channels)) * deviation + mean).flatten(-2)
        elif c.norm == "range":
            prediction = prediction.unflatten(-1, (-1, c.channels))
            prediction = ((prediction - prediction.new_tensor(c.mean)) / prediction.new_tensor(c.std)).flatten(-2)
        order = torch.cat([seen, prediction.to(seen.dtype)], 1).gather(1, masking.restore[..., None].expand_as(patches))
        return unpatchify(order, grid, c.patch, c.frames)

    def cover(self, pixels: Tensor, masking: Masking, grid: tuple[int, ...], value: float = 0.0) -> Tensor:
        """The picture with its hidden patches in one value: what the model is shown."""
        return unpatchify(self.patches(pixels).masked_fill(masking.mask[..., None], value), grid, self.c.patch, self.c.frames)


class GridPixels(PixelTarget):
    """The same, samples one after the other and patches in the order of the grid: beside heads that say it in this order (CodeHead)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PixelTarget.Config):
        pass

    @torch.no_grad()
    def forward(self, pixels: Tensor, masking: Masking) -> Tensor:
        """-> [M,frames*P*P*C] of the whole batch."""
        return self.normalised(self.patches(pixels))[masking.mask]

    def paint(self, pixels: Tensor, masking: Masking, prediction: Tensor, grid: tuple[int, ...]) -> Tensor:
        """As PixelTarget.paint, of predictions [M,.]. UserError where samples hide different numbers of patches."""
        return super().paint(pixels, masking_of(masking.mask), prediction.unflatten(0, (len(pixels), -1)), grid)


class FramePixels(PixelTarget):
    """The same of some frames of a clip alone: `said` of them, evenly spread, ends included, `frames` of which belong to a cube of the encoder
    (Feichtenhofer et al. 2022, MAE-ST, released code: 8 of 16 frames, one for every cube of two)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PixelTarget.Config):
        said: int

    def chosen(self, total: int) -> Tensor:
        """Numbers of the frames, of so many; fractions are cut off."""
        return torch.linspace(0, total - 1, self.c.said).long()  # type: ignore[attr-defined]

    def patches(self, pixels: Tensor) -> Tensor:
        """[B,T,C,H,W] -> [B,N,frames*P*P*C] of the chosen frames."""
        return super().patches(pixels[:, self.chosen(pixels.shape[1]).to(pixels.device)])
