"""DCGAN's two networks, told what to draw. Shapes: B batch, S side of a picture, D width of a text feature, P of its projection, Z of the noise."""
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.check import check_image
from polysense.nn.norm import BatchNorm2d

SLOPE = 0.2                                  # of every leaky ReLU


def doublings(size: int) -> int:
    """From 4x4 to size x size. Raises UserError where that is no power of two times four."""
    steps = size.bit_length() - 3
    if steps < 1 or size != 4 << steps:
        raise UserError(f"pictures of {size} pixels", "this network draws 8, 16, 32, 64, 128 ...")
    return steps


def _norm(width: int) -> nn.Module:
    norm = BatchNorm2d(BatchNorm2d.Config(width=width))
    nn.init.normal_(norm.weight, 1.0, 0.02)
    return norm


def _born(module: nn.Module) -> None:
    """Every convolution and linear: normal of deviation 0.02, biases zero (Radford et al. 2016, section 4)."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class TextGenerator(Part):
    """G(z, phi): [z; leaky(W phi)] as a 1x1 map, transposed convolutions to 4x4 and doubling from there, batch norm and ReLU, tanh at the end."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        text: int                            # width of phi
        size: int
        width: int                           # of the last hidden map; each one before has twice as much
        noise: int = 100
        project: int = 128

    def __init__(self, c: Config):
        super().__init__()
        steps = doublings(c.size)
        widths = [c.width << i for i in reversed(range(steps))]
        self.project = nn.Linear(c.text, c.project)
        self.first, self.norm = nn.ConvTranspose2d(c.noise + c.project, widths[0], 4, bias=False), _norm(widths[0])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(_norm(b) for b in widths[1:])
        self.last, self.noise = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1), c.noise
        _born(self)

    def forward(self, noise: Tensor, phi: Tensor) -> Tensor:
        """noise [B,Z], phi [B,D] -> image [B,3,S,S] in [-1,1]."""
        x = torch.cat([noise, F.leaky_relu(self.project(phi), SLOPE).to(noise.dtype)], 1)[..., None, None]
        x = F.relu(self.norm(self.first(x)))
        for up, norm in zip(self.ups, self.norms, strict=True):
            x = F.relu(norm(up(x)))
        return torch.tanh(self.last(x).float())


class TextDiscriminator(Part):
    """D(x, phi): strided convolutions to 4x4 (leaky ReLU, batch norm but in the first), its own projection of phi copied to every place, a 1x1
    convolution over both, and a 4x4 one to a single logit."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        text: int
        size: int
        width: int                           # of the first map; each one after has twice as much
        project: int = 128

    def __init__(self, c: Config):
        super().__init__()
        widths = [c.width << i for i in range(doublings(c.size))]
        self.size = c.size
        self.first = nn.Conv2d(3, widths[0], 4, 2, 1)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(_norm(b) for b in widths[1:])
        self.project = nn.Linear(c.text, c.project)
        self.join, self.norm = nn.Conv2d(widths[-1] + c.project, widths[-1], 1, bias=False), _norm(widths[-1])
        self.last = nn.Conv2d(widths[-1], 1, 4)
        _born(self)

    def forward(self, image: Tensor, phi: Tensor) -> Tensor:
        """image [B,3,S,S], phi [B,D] -> logits [B]: real, and what phi says. Raises UserError for another size."""
        check_image(image, 3)
        if image.shape[-2:] != (self.size, self.size):
            raise UserError(f"an image of {image.shape[2]}x{image.shape[3]} pixels", f"this discriminator reads {self.size}x{self.size}")
        x = F.leaky_relu(self.first(image), SLOPE)
        for down, norm in zip(self.downs, self.norms, strict=True):
            x = F.leaky_relu(norm(down(x)), SLOPE)
        said = F.leaky_relu(self.project(phi), SLOPE)[..., None, None].expand(-1, -1, *x.shape[-2:])
        x = F.leaky_relu(self.norm(self.join(torch.cat([x, said.to(x.dtype)], 1))), SLOPE)
        return self.last(x).flatten(1)[:, 0].float()
