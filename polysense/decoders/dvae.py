"""DALL-E's discrete VAE: a picture to logits over codes, (relaxed) one-hot codes to a picture. Shapes: B batch, H W pixels, h w grid, K codes."""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.vq_codec import check_codes, check_grid

EPS = 0.1                                    # of the map of pixels into [eps, 1 - eps]


def _conv(into: int, out: int, kernel: int) -> nn.Conv2d:
    """A convolution born with deviation fan_in ** -1/2 and no bias (released code)."""
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=(into * kernel ** 2) ** -0.5)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class _Block(nn.Module):
    """shortcut(x) + gain * conv4(relu(conv3(relu(conv2(relu(conv1(relu(x)))))))), hidden width a quarter of the output's."""

    def __init__(self, into: int, out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        widths = (into, out // 4, out // 4, out // 4, out)
        self.convs = nn.ModuleList(_conv(a, b, k) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True))
        self.shortcut = _conv(into, out, 1) if into != out else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(F.relu(y))
        return self.shortcut(x) + self.gain * y


def _stages(into: int, widths: tuple[int, ...], depth: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    """`stages.{s}.{b}`: `depth` blocks a stage; the gain is one over the square of the number of all blocks."""
    stages, gain = nn.ModuleList(), (len(widths) * depth) ** -2
    for width in widths:
        stages.append(nn.Sequential(*(_Block(into if b == 0 else width, width, kernels, gain) for b in range(depth))))
        into = width
    return stages


class DVAEEncoder(Part):
    """A 7x7 convolution, stages of residual blocks with a max pool between them, ReLU and a 1x1 convolution to the codes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codes: int
        width: int = 256                     # of the first stage; each stage doubles it
        groups: int = 4                      # stages; the stride is 2 ** (groups - 1)
        depth: int = 2                       # blocks a stage
        channels: int = 3
        spread: float = 1.0                  # factor of the output's weights at birth: short runs do not live to see logits grow beyond the noise.
                                             # Above 1 a grey picture has equal logits as well: what all pictures share would choose their codes

    def __init__(self, c: Config):
        super().__init__()
        widths = tuple(c.width * 2 ** g for g in range(c.groups))
        self.input = _conv(c.channels, c.width, 7)
        self.stages: Any = _stages(c.width, widths, c.depth, (3, 3, 3, 1))
        self.output = _conv(widths[-1], c.codes, 1)
        self.stride, self.codes, self.channels = 2 ** (c.groups - 1), c.codes, c.channels
        if c.spread > 1:
            self._spread(c.spread)

    @torch.no_grad()
    def _spread(self, factor: float) -> None:
        """Released weights give much the same logits everywhere; multiplied, the greatest of them would take every place."""
        self.output.weight.mul_(factor)
        grey = self(torch.full((1, self.channels, *[4 * self.stride] * 2), 0.5))
        self.output.bias.copy_(-grey.mean((0, 2, 3)))  # type: ignore[union-attr]

    def forward(self, mapped: Tensor) -> Tensor:
        """mapped pixels [B,C,H,W] -> logits [B,K,h,w]."""
        x = self.input(mapped)
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
        return self.output(F.relu(x))


class DVAEDecoder(Part):
    """The mirror: 1x1 convolution of the one-hot codes, stages with nearest-neighbour upsampling between them, 2 C channels out."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codes: int
        into: int = 128                      # width of a code's vector
        width: int = 256
        groups: int = 4
        depth: int = 2
        channels: int = 3

    def __init__(self, c: Config):
        super().__init__()
        self.input = _conv(c.codes, c.into, 1)
        self.stages: Any = _stages(c.into, tuple(c.width * 2 ** g for g in reversed(range(c.groups))), c.depth, (1, 3, 3, 3))
        self.output = _conv(c.width, 2 * c.channels, 1)
        self.codes = c.codes

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """soft or hard one-hot codes [B,K,h,w] -> mu and ln b of the logit-Laplace distribution, [B,C,H,W] each."""
        return self.draw(self.input(codes))

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, from the vectors [B,into,h,w] of the codes."""
        for i, stage in enumerate(self.stages):
            x = stage(F.interpolate(x, scale_factor=2.0) if i else x)
        mu, log_b = self.output(F.relu(x)).float().chunk(2, 1)
        return mu, log_b


class DVAECodec(Part):
    """Encoder and decoder as a codec: `codes`, `stride`, `ids(image)`, `decode(ids)`. Pictures are in [0, 1]; the map of pixels happens inside.

    Without a decoder (published tokenizers, the targets of BEiT) it only encodes.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        encoder: DVAEEncoder.Config
        decoder: DVAEDecoder.Config | None

        @property
        def codes(self) -> int:
            return self.encoder.codes

    def __init__(self, c: Config):
        super().__init__()
        self.encoder, self.decoder = c.encoder.build(), c.decoder.build() if c.decoder is not None else None
        if c.decoder is not None and (c.decoder.codes, c.decoder.groups) != (c.encoder.codes, c.encoder.groups):
            raise UserError("encoder and decoder differ in codes or groups", "they mirror each other")
        self.codes, self.stride = c.encoder.codes, self.encoder.stride

    def logits(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] in [0,1] -> logits [B,h,w,K]. Raises UserError for wrong channels or a size that the stride does not divide."""
        check_grid(image, self.encoder.channels, self.stride)
        return self.encoder((1 - 2 * EPS) * image + EPS).permute(0, 2, 3, 1).float()

    def ids(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] in [0,1] -> the most probable codes [B,h,w], without noise."""
        return self.logits(image).argmax(-1)

    def spread(self, soft: Tensor) -> tuple[Tensor, Tensor]:
        """soft codes [B,h,w,K], rows that sum to one -> mu, ln b [B,C,H,W]."""
        if self.decoder is None:
            raise UserError("these weights have no decoder", "they make codes of pictures, not pictures of codes")
        return self.decoder(soft.permute(0, 3, 1, 2))

    def decode(self, ids: Tensor) -> Tensor:
        """ids [B,h,w] -> image [B,C,H,W] in [0,1]: the unmapped sigmoid of mu."""
        check_codes(ids, self.codes)
        if ids.ndim != 3:
            raise UserError(f"codes of shape {list(ids.shape)}", "a grid of code numbers is [B,h,w]")
        if self.decoder is None:
            raise UserError("these weights have no decoder", "they make codes of pictures, not pictures of codes")
        weight, bias = self.decoder.input.weight[:, :, 0, 0].T, self.decoder.input.bias       # a one-hot times a matrix is a row of it
        return self.picture(self.decoder.draw((F.embedding(ids, weight) + bias).permute(0, 3, 1, 2))[0])

    @staticmethod
    def picture(mu: Tensor) -> Tensor:
        """mu [B,C,H,W] -> image in [0,1]."""
        return ((torch.sigmoid(mu.float()) - EPS) / (1 - 2 * EPS)).clamp(0, 1)
