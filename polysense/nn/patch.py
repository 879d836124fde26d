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
