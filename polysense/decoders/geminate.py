"""Two decoders over one encoder, one for pixels and one for frequencies. Shapes: B batch, M hidden patches, P numbers of a patch, C channels."""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.mae import MAEDecoder
from polysense.decoders.pixels import PixelTarget
from polysense.nn.fourier import from_spectrum, spectrum
from polysense.nn.masking import Masking
from polysense.nn.patch import patchify, unpatchify
from polysense.nn.transformer import Transformer


class Both(NamedTuple):
    """What is drawn, and what each drawing is in the other's terms."""
    patches: Tensor                          # [B,M,P] of the pixel decoder
    spectrum: Tensor                         # [B,2C,H,W] of the frequency decoder
    spectrum_of_patches: Tensor              # [B,2C,H,W], of the whole picture that the pixel decoder draws
    patches_of_spectrum: Tensor              # [B,M,P], of the picture whose spectrum the frequency decoder draws


class Geminated(Part):
    """A pixel decoder and a frequency decoder, each with a projection, a token, positions and blocks of its own (Liu et al. 2023, section 3.2).

    The tokens of the frequency decoder stand for the patches of the centred spectrum: token (i, j) says the real and imaginary parts of a square
    of frequencies, as that of the other one says a square of pixels.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        patch: int
        pixel: Transformer.Config
        frequency: Transformer.Config
        into: int = 0                        # width of the encoder's tokens; 0: set by the owner, as the next two
        out: int = 0                         # numbers of a patch
        grid: tuple[int, ...] | None = None  # (h, w)
        prefix: int = 1

    def __init__(self, c: Config):
        super().__init__()
        assert c.grid is not None
        self.patch, self.grid = c.patch, c.grid
        self.pixel = MAEDecoder.Config(body=c.pixel, into=c.into, out=c.out, grid=c.grid, prefix=c.prefix).build()
        self.frequency = MAEDecoder.Config(body=c.frequency, into=c.into, out=2 * c.out, grid=c.grid, prefix=c.prefix).build()

    def pixels(self, seen: Tensor, masking: Masking) -> Tensor:
        """seen [B, prefix + K, into] -> the pixels of the hidden patches [B,M,P]."""
        return self.pixel(seen, masking)

    def forward(self, seen: Tensor, masking: Masking) -> Both:
        drawn = self.pixel.whole(seen, masking)
        parts = unpatchify(self.frequency.whole(seen, masking), self.grid, self.patch)
        back = patchify(from_spectrum(parts), self.patch)
        return Both(masking.at_hidden(drawn), parts.float(), spectrum(unpatchify(drawn, self.grid, self.patch)), masking.at_hidden(back))


class GeminateTarget(PixelTarget):
    """The pixels of the hidden patches as they are, and the spectrum of the whole picture."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PixelTarget.Config):
        pass

    @torch.no_grad()
    def forward(self, pixels: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """-> ([B,M,P], [B,2C,H,W])."""
        return masking.at_hidden(self.patches(pixels)), spectrum(pixels)
