"""StyleGAN2's discriminator. Shapes: B batch, C channels, H W pixels."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.decoders.patch_critic import Critic
from polysense.nn.check import check_image

SLOPE, GAIN = 0.2, 2 ** 0.5


class _Equal(nn.Module):
    """A convolution (kernel k) or a linear (k = 0) whose weight is normal at birth and scaled by 1 / sqrt(inputs) whenever it is used."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, into, *(kernel,) * 2) if kernel else torch.randn(out, into))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.stride, self.kernel = stride, kernel

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight * self.weight[0].numel() ** -0.5
        if not self.kernel:
            return F.linear(x, w, self.bias)
        return F.conv2d(x, w, self.bias, self.stride, self.kernel // 2 if self.stride == 1 else 0)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE) * GAIN


class _Halve(nn.Module):
    """(act(down(act(conv(x)))) + skip(x)) / sqrt(2); what halves the map is blurred first, so that no frequency folds over."""

    blur: Tensor

    def __init__(self, into: int, out: int):
        super().__init__()
        self.conv, self.down = _Equal(into, into, 3), _Equal(into, out, 3, 2)
        self.skip = _Equal(into, out, 1, 2, bias=False)
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", torch.outer(line, line), persistent=False)

    def blurred(self, x: Tensor, pad: int) -> Tensor:
        c = x.shape[1]
        return F.conv2d(F.pad(x, (pad,) * 4), self.blur.expand(c, 1, 4, 4), groups=c)

    def forward(self, x: Tensor) -> Tensor:
        y = _act(self.down(self.blurred(_act(self.conv(x)), 2)))
        return (y + self.skip(self.blurred(x, 1))) / GAIN


class StyleCritic(Critic):
    """Residual blocks that halve the map down to 4x4, the deviation over the batch as one more channel, two dense layers: [B,3,H,W] -> [B]
    (Karras et al. 2020, StyleGAN2, figure 7; equalised learning rates, section 4.1 of Karras et al. 2018)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        size: int
        widths: tuple[int, ...]              # of the maps of size, size / 2 ... 4 places
        group: int = 4                       # pictures over which the deviation is taken, where they divide the batch

    def __init__(self, c: Config):
        super().__init__()
        if c.size != 4 << (len(c.widths) - 1):
            raise UserError(f"{len(c.widths)} widths for pictures of {c.size} pixels", f"they reach from {4 << (len(c.widths) - 1)} to 4")
        self.first = _Equal(3, c.widths[0], 1)
        self.blocks = nn.Sequential(*(_Halve(a, b) for a, b in zip(c.widths, c.widths[1:])))
        last = c.widths[-1]
        self.conv, self.dense, self.last = _Equal(last + 1, last, 3), _Equal(16 * last, last, 0), _Equal(last, 1, 0)
        self.size, self.group = c.size, c.group

    def forward(self, image: Tensor) -> Tensor:
        """Raises UserError for another size."""
        check_image(image, 3)
        if image.shape[2:] != (self.size, self.size):
            raise UserError(f"an image of {image.shape[2]}x{image.shape[3]} pixels", f"this critic reads {self.size}x{self.size}")
        x = self.blocks(_act(self.first(image)))
        n = self.group if len(x) % self.group == 0 else len(x)
        spread = (x.unflatten(0, (n, -1)).var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        x = torch.cat([x, spread.repeat(n).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)], 1)
        return self.last(_act(self.dense(_act(self.conv(x)).flatten(1))))[:, 0]
