"""Images into tokens."""
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.nn.check import check_image


class Patches(nn.Conv2d):
    """A PxP convolution of stride P, [B,C,H,W] -> [B,h,w,D], stored as a convolution and computed as one matrix product over the flattened
    patches (the same sum; on processors without a convolution of that shape several times faster, backward above all)."""

    def __init__(self, channels: int, width: int, patch: int, bias: bool = True):
        super().__init__(channels, width, patch, patch, bias=bias)
        nn.init.trunc_normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        check_image(image, self.in_channels)
        p, (b, c, h, w) = self.kernel_size[0], image.shape
        if h % p or w % p:
            raise UserError(f"an image of {h}x{w} pixels does not divide into {p}x{p} patches", f"choose sides that are multiples of {p}")
        flat = image.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h // p, w // p, c * p * p)
        return F.linear(flat, self.weight.flatten(1), self.bias)


def patchify(pixels: Tensor, patch: int, frames: int = 1) -> Tensor:
    """Pictures [B,C,H,W], or clips [B,T,C,H,W] -> [B,N,frames*P*P*C]: patches (cubes) in the order time, row, column; in each the values in the
    order time, row, column, channel (He et al. 2022, released code). UserError where they do not divide."""
    if pixels.ndim not in (4, 5):
        raise UserError(f"pixels of shape {list(pixels.shape)}", "give pictures [B,C,H,W] or clips [B,T,C,H,W]")
    clip = pixels[:, None] if pixels.ndim == 4 else pixels
    b, t, c, h, w = clip.shape
    if t % frames or h % patch or w % patch:
        raise UserError(f"{t} frames of {h}x{w} pixels do not divide into patches of {frames}x{patch}x{patch}", "choose multiples")
    cubes = clip.reshape(b, t // frames, frames, c, h // patch, patch, w // patch, patch)
    return cubes.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(b, -1, frames * patch * patch * c)


def unpatchify(patches: Tensor, grid: tuple[int, ...], patch: int, frames: int = 1) -> Tensor:
    """The inverse: [B,N,frames*P*P*C] of a grid (h, w) -> [B,C,H,W], of a grid (t, h, w) -> [B,T,C,H,W]."""
    t, h, w = grid if len(grid) == 3 else (1, *grid)
    c = patches.shape[2] // (frames * patch * patch)
    clip = patches.reshape(len(patches), t, h, w, frames, patch, patch, c).permute(0, 1, 4, 7, 2, 5, 3, 6)
    clip = clip.reshape(len(patches), t * frames, c, h * patch, w * patch)
    return clip if len(grid) == 3 else clip[:, 0]
