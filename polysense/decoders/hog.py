"""Histograms of oriented gradients as what a masked model predicts. Shapes: B batch, C channels, K bins, N patches, M hidden ones of the batch."""
from dataclasses import dataclass
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.masking import Masking

NORMS = ("cell", "none")
CACHED = 1 << 19                             # numbers of a picture batch that are worked on at once: what stays in a processor's cache
SMALL = 1e-12                                # a cell whose histogram is shorter is flat: it stays zero


def gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    """image [B,C,H,W] -> (gx, gy) [B,C,H,W] each: [1 2 1]^T [1 0 -1] and its transpose, the border mirrored.

    Both kernels are separable; a difference of two shifted sums costs less than a convolution of nine taps on every channel.
    """
    x = F.pad(image, (1, 1, 1, 1), mode="reflect")
    down = torch.add(x[..., :-2, :], x[..., 1:-1, :], alpha=2).add_(x[..., 2:, :])
    across = torch.add(x[..., :-2], x[..., 1:-1], alpha=2).add_(x[..., 2:])
    return down[..., :-2] - down[..., 2:], across[..., :-2, :] - across[..., 2:, :]


def hog(image: Tensor, bins: int = 9, cell: int = 8, norm: str = "cell") -> Tensor:
    """image [B,C,H,W] -> [B,C,K,h,w], h = H / cell: for every cell and channel how much gradient points each way, in float32.

    The angle atan2(gx, gy), counted in K parts of pi and modulo K (a direction and its opposite are one), chooses one bin without interpolation; it
    gets the magnitude. norm "cell": each K-vector has unit length, or is zero where the cell is flat (Wei et al. 2022, MaskFeat, section 3.2).
    """
    if image.shape[-2] % cell or image.shape[-1] % cell or min(image.shape[-2:]) < 2:
        raise UserError(f"an image of {image.shape[-2]}x{image.shape[-1]} pixels does not divide into cells of {cell}", "choose multiples")
    few = max(1, CACHED // image[0].numel()) if len(image) and image.device.type == "cpu" else len(image)
    return torch.cat([_histograms(part, bins, cell, norm) for part in image.float().split(max(1, few))])


def _histograms(image: Tensor, bins: int, cell: int, norm: str) -> Tensor:
    gx, gy = gradients(image)
    b, c, height, width = image.shape
    h, w = height // cell, width // cell
    # Angles from -K to K become numbers from 0 to 2 K, which are folded when they are counted. One addition puts the pixels of each channel
    # where they belong: the bin, and the cell (whole numbers far below 2^24, exact in float32).
    kinds = 2 * bins + 1
    place = torch.arange(h, device=image.device).repeat_interleave(cell)[:, None] * w + torch.arange(w, device=image.device).repeat_interleave(cell)
    with torch.no_grad():
        row = torch.atan2(gx, gy).mul_(bins / pi).floor_().add_((place * kinds + bins).float()).long()
    squared = (gx * gx).addcmul(gy, gy)
    # the root of zero would have no finite gradient
    magnitude = squared.where(squared > 0, 1.0).sqrt().where(squared > 0, 0.0) if squared.requires_grad else squared.sqrt_()
    flat = magnitude.new_zeros(b * c, h * w * kinds).scatter_add(1, row.view(b * c, -1), magnitude.view(b * c, -1)).view(b, c, h, w, kinds)
    out = flat[..., :bins] + flat[..., bins:2 * bins]
    out = torch.cat([out[..., :1] + flat[..., 2 * bins:], out[..., 1:]], -1)
    return (F.normalize(out, dim=-1, eps=SMALL) if norm == "cell" else out).permute(0, 1, 4, 2, 3)


class HOGTarget(Part):
    """The histograms of a patch's cells: `channels * bins * (patch / cell)^2` numbers, 108 for a patch of 16 px and cells of 8.

    In the order channel, bin, row, column of the cell. Computed of the whole picture as the feed normalised it: cells at the border of a patch look
    one pixel beyond it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        patch: int
        cell: int = 8
        bins: int = 9
        channels: int = 3
        norm: str = "cell"                   # "none": not normalised, which costs accuracy (table 9)

        @property
        def width(self) -> int:
            return self.channels * self.bins * (self.patch // self.cell) ** 2

    def __init__(self, c: Config):
        super().__init__()
        if c.norm not in NORMS or c.cell < 1 or c.patch % c.cell:
            raise UserError(f"patch={c.patch}, cell={c.cell}, norm={c.norm!r} make no histograms",
                            f"cells divide the patch, norm is one of {', '.join(NORMS)}")
        self.c = c

    @torch.no_grad()
    def whole(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W] -> [B,N,width], of every patch."""
        c, n = self.c, self.c.patch // self.c.cell
        found = hog(pixels, c.bins, c.cell, c.norm).flatten(1, 2)                        # B CK h w
        return F.unfold(found, n, stride=n).transpose(1, 2)

    def forward(self, pixels: Tensor, masking: Masking) -> Tensor:
        """-> [M,width], of the hidden patches, samples one after the other, in the order of the grid."""
        return self.whole(pixels)[masking.mask]


class FramesHOG(HOGTarget):
    """The same of clips: of every cube of `every` frames the histograms of its first, in the middle of what the tower's first convolution reads
    (Wei et al. 2022, section 4.3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HOGTarget.Config):
        every: int = 2

    @torch.no_grad()
    def whole(self, pixels: Tensor) -> Tensor:
        """pixels [B,F,3,H,W] -> [B,N,width], of every cube, time first."""
        frames = pixels[:, ::self.c.every]  # type: ignore[attr-defined]
        return super().whole(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).flatten(1, 2)
