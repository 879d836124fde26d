"""Codes as what a masked model predicts. Shapes: B batch, N patches, M hidden ones of the whole batch, K codes, D width."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.masking import Masking


class CodeHead(Part):
    """softmax(W h + b) over the codes, at hidden patches only (Bao et al. 2022, section 2.3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int = 0                        # width of the encoder's tokens; 0: set by the owner, as the next
        out: int = 0                         # codes
        prefix: int = 1                      # tokens before the patches
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        self.head, self.prefix = nn.Linear(c.into, c.out), c.prefix
        nn.init.trunc_normal_(self.head.weight, std=c.std, a=-2 * c.std, b=2 * c.std)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, masking: Masking) -> Tensor:
        """tokens [B, prefix + N, D], normed -> logits [M,K], samples one after the other, patches in the order of the grid."""
        return self.head(tokens[:, self.prefix:][masking.mask])

    def whole(self, tokens: Tensor) -> Tensor:
        """Logits of every patch, [B,N,K]."""
        return self.head(tokens[:, self.prefix:])


class CodeTarget(Part):
    """The codes that a frozen codec gives the whole picture, nothing hidden: a second, smaller view of the very same crop.

    The picture is taken back to [0,1], shrunk to `size` with a Lanczos kernel (as BEiT's data pipeline does) and normalised for the codec.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codec: Spec
        size: int                            # side of the picture that the codec reads
        mean: tuple[float, ...]              # of the feed
        std: tuple[float, ...]
        codec_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
        codec_std: tuple[float, ...] = (1.0, 1.0, 1.0)

        @property
        def width(self) -> int:
            """How many codes there are: what the decoder puts out."""
            return self.codec.codes  # type: ignore[attr-defined]

    def __init__(self, c: Config):
        super().__init__()
        self.codec, self.c = c.codec.build(), c

    @torch.no_grad()
    def ids(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W], as the feed says -> codes [B,h,w]."""
        c = self.c
        mean, std, their_mean, their_std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (c.mean, c.std, c.codec_mean, c.codec_std))
        small = shrink((pixels * std + mean).clamp(0, 1), c.size)
        return self.codec.ids((small - their_mean) / their_std)

    @torch.no_grad()
    def forward(self, pixels: Tensor, masking: Masking) -> Tensor:
        """-> [M], the codes of the hidden patches. UserError where the codec's grid is not the patches'."""
        ids = self.ids(pixels).flatten(1)
        if ids.shape != masking.mask.shape:
            raise UserError(f"{ids.shape[1]} codes for {masking.mask.shape[1]} patches", "size / stride of the codec must be image size / patch")
        return ids[masking.mask]


def shrink(image: Tensor, size: int, lobes: int = 3) -> Tensor:
    """image [B,C,H,W] in [0,1] -> [B,C,size,size], Lanczos with the support widened by the scale (antialiased), clamped to [0,1].

    What Pillow's LANCZOS does, but for its rounding to 256 levels between the two axes.
    """
    if image.shape[-2:] == (size, size):
        return image
    rows, columns = (_lanczos(n, size, lobes).to(image) for n in image.shape[-2:])
    return (rows @ image @ columns.T).clamp(0, 1)


def _lanczos(old: int, new: int, lobes: int) -> Tensor:
    """[new, old], rows sum to one."""
    scale = max(old / new, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new
    x = (torch.arange(old, dtype=torch.float64) + 0.5 - centre[:, None]) / scale
    weight = torch.where(x.abs() < lobes, torch.sinc(x) * torch.sinc(x / lobes), 0.0)
    return (weight / weight.sum(1, keepdim=True)).float()
