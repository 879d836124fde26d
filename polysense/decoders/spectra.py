"""Spectra as what a masked model predicts. Shapes: B batch, N patches, C channels, H W pixels, or as many frequencies."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.fourier import spectrum
from polysense.nn.masking import Masking
from polysense.nn.patch import unpatchify


class SpectrumTarget(Part):
    """The two-dimensional spectrum of the whole picture, [B,2C,H,W]: a hidden patch has a part in every frequency, so none is left out."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        patch: int
        channels: int = 3

        @property
        def width(self) -> int:
            """Numbers of a patch of the picture that has this spectrum."""
            return self.patch ** 2 * self.channels

    def __init__(self, c: Config):
        super().__init__()

    @torch.no_grad()
    def forward(self, pixels: Tensor, masking: Masking) -> Tensor:
        return spectrum(pixels)


class SpectrumHead(Part):
    """A linear layer draws every patch, hidden or not; what is said is the spectrum of that picture, [B,2C,H,W]. `draw`: the picture itself."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        patch: int
        into: int = 0                        # width of the encoder's tokens; 0: set by the owner, as the next two
        out: int = 0                         # numbers of a patch
        grid: tuple[int, ...] | None = None  # (h, w)
        prefix: int = 1

    def __init__(self, c: Config):
        super().__init__()
        self.head, self.c = nn.Linear(c.into, c.out), c
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def draw(self, tokens: Tensor) -> Tensor:
        """tokens [B, prefix + N, D] -> [B,C,H,W]."""
        assert self.c.grid is not None
        return unpatchify(self.head(tokens[:, self.c.prefix:]), self.c.grid, self.c.patch)

    def forward(self, tokens: Tensor, masking: Masking) -> Tensor:
        return spectrum(self.draw(tokens))
