"""VQ-VAE's codec: pictures to a grid of code numbers and back. Shapes: B batch, H W pixels, h w grid, K codes, D width of a code vector."""
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.check import check_image


class Quantized(NamedTuple):
    """ids [B,h,w]; vectors [B,h,w,D] of the codebook, with its gradient; passed [B,h,w,D], the same numbers with the gradient of the encoder."""
    ids: Tensor
    vectors: Tensor
    passed: Tensor


class _Through(torch.autograd.Function):
    """Forward the code vectors, bit for bit; backward their gradient to the encoder, unchanged: z + sg(e - z) without its rounding."""

    @staticmethod
    def forward(ctx: Any, encoded: Tensor, vectors: Tensor) -> Tensor:
        return vectors.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


@dataclass(frozen=True, kw_only=True)
class Codebook(Spec):
    """What the Config of every quantizer says."""
    codes: int
    width: int


class VectorQuantizer(Part):
    """k = argmin_j ||z - e_j||, with a straight-through gradient (van den Oord et al. 2017, equations 1 and 2).

    `codebook` [K,D] is a parameter that the codebook loss moves or, with `decay`, a buffer that `move` puts to the running mean of the
    vectors assigned to each code (appendix A.1). `count` [K] is the running number of vectors a step assigned to each code.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Codebook):
        decay: float | None = None           # gamma of the running means, 0.99 in the paper; None: the codebook is a parameter
        idle: float = 0.0                    # a code used less than this share of even use is born again on an encoder output (not in the paper)
        memory: float = 0.99                 # decay of `count` where the codebook is a parameter
        std: float | None = None             # deviation of the codebook at birth; None: uniform in +-1/K

    def __init__(self, c: Config):
        super().__init__()
        if c.decay is not None and not 0 <= c.decay < 1:
            raise UserError(f"decay={c.decay} is not a decay", "it lies between 0 and 1, for example 0.99; None learns the codebook by gradient")
        book = (torch.rand(c.codes, c.width) * 2 - 1) / c.codes if c.std is None else torch.randn(c.codes, c.width) * c.std
        self.decay, self.idle, self.memory, self.codes, self.width = c.decay, c.idle, c.memory, c.codes, c.width
        if c.decay is None:
            self.codebook = nn.Parameter(book)
        else:
            self.register_buffer("codebook", book)
            self.register_buffer("total", book.clone())
        self.register_buffer("count", torch.ones(c.codes))

    def forward(self, encoded: Tensor) -> Quantized:
        """encoded [...,D] -> Quantized, in float32 under any autocast: neighbours are decided by small differences of large squares."""
        with torch.autocast(encoded.device.type, enabled=False):
            z = encoded.float()
            book: Tensor = self.codebook.float()  # type: ignore[assignment]
            with torch.no_grad():
                flat = z.reshape(-1, self.width)
                ids = (book.square().sum(1) - 2 * flat @ book.T).argmin(1).view(z.shape[:-1])
            vectors = F.embedding(ids, book)
            return Quantized(ids, vectors, _Through.apply(z, vectors))  # type: ignore[arg-type]

    def vectors(self, ids: Tensor) -> Tensor:
        """ids [...] -> code vectors [...,D]. Raises UserError for what is no code."""
        check_codes(ids, self.codes)
        return F.embedding(ids, self.codebook.float())  # type: ignore[arg-type]

    @torch.no_grad()
    def move(self, encoded: Tensor, ids: Tensor, step: int = 0) -> None:
        """One step of what moves without gradient, from the vectors [...,D] of a step and the codes [...] they were given.

        The running means (with `decay`): N_i <- g N_i + (1 - g) n_i, m_i <- g m_i + (1 - g) sum z, e_i = m_i / N_i. A code that no vector
        chose keeps its place exactly. Then codes that lie idle are put on random vectors; `step` seeds the draw, so that equal ranks agree.
        """
        z, ids = encoded.reshape(-1, self.width).float(), ids.flatten()
        count: Tensor = self.count  # type: ignore[assignment]
        book: Tensor = self.codebook.data  # type: ignore[assignment]
        fresh, keep = torch.bincount(ids, minlength=self.codes).float(), self.memory if self.decay is None else self.decay
        count.lerp_(fresh, 1 - keep)
        total: Any = getattr(self, "total", None)
        if total is not None:
            total.lerp_(torch.zeros_like(book).index_add_(0, ids, z), 1 - keep)
            used = fresh > 0
            book[used] = (total / count.clamp_min(1e-5)[:, None])[used]
        dead = (count < self.idle * count.mean()).nonzero().flatten()
        if len(dead):
            # A random set of encoder outputs, one for each dead code; born with even use, so that they get time to be chosen.
            generator = torch.Generator().manual_seed(step)
            rows = torch.randint(len(z), (len(dead),), generator=generator).to(z.device)
            book[dead], count[dead] = z[rows], count.mean()
            if total is not None:
                total[dead] = book[dead] * count[dead][:, None]


def check_codes(ids: Tensor, codes: int) -> None:
    """Raises UserError unless ids are int and in [0, codes)."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"code numbers of type {ids.dtype}", "give the integers that encode_codes returned")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= codes):
        raise UserError(f"a code outside [0, {codes})", "these codes are of another tokenizer")


class _Residual(nn.Module):
    """x + 1x1(relu(3x3(relu(x))))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, hidden, 3, padding=1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ConvEncoder(Part):
    """`halvings` 4x4 convolutions of stride 2, residual blocks, a 1x1 convolution to the code width (van den Oord et al. 2017, section 4.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        hidden: int                          # of the residual blocks
        out: int
        halvings: int = 2
        depth: int = 2                       # residual blocks
        channels: int = 3

    def __init__(self, c: Config):
        super().__init__()
        self.downs = nn.ModuleList(nn.Conv2d(c.width if i else c.channels, c.width, 4, 2, 1) for i in range(c.halvings))
        self.blocks = nn.ModuleList(_Residual(c.width, c.hidden) for _ in range(c.depth))
        self.out, self.stride, self.channels = nn.Conv2d(c.width, c.out, 1), 2 ** c.halvings, c.channels

    def forward(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] -> [B,D,h,w]."""
        x = image
        for i, down in enumerate(self.downs):
            x = down(F.relu(x) if i else x)
        for block in self.blocks:
            x = block(x)
        return self.out(F.relu(x))


class ConvDecoder(Part):
    """The mirror: 3x3 convolution, residual blocks, `doublings` 4x4 transposed convolutions of stride 2."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        width: int
        hidden: int
        doublings: int = 2
        depth: int = 2
        channels: int = 3

    def __init__(self, c: Config):
        super().__init__()
        self.into = nn.Conv2d(c.into, c.width, 3, padding=1)
        self.blocks = nn.ModuleList(_Residual(c.width, c.hidden) for _ in range(c.depth))
        last = c.doublings - 1
        self.ups = nn.ModuleList(nn.ConvTranspose2d(c.width, c.channels if i == last else c.width, 4, 2, 1) for i in range(c.doublings))

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B,D,h,w] -> image [B,C,H,W]."""
        x = self.into(codes)
        for block in self.blocks:
            x = block(x)
        for up in self.ups:
            x = up(F.relu(x))
        return x


class VQCodec(Part):
    """Encoder, quantizer, decoder. Every codec of the house has `codes`, `stride`, `ids(image)` and `decode(ids)`: all that others stand on."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        encoder: Spec
        quantizer: Codebook
        decoder: Spec

        @property
        def codes(self) -> int:
            return self.quantizer.codes

    def __init__(self, c: Config):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = c.encoder.build(), c.quantizer.build(), c.decoder.build()
        self.codes, self.stride = c.quantizer.codes, self.encoder.stride

    def encode(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] -> z_e [B,h,w,D]. Raises UserError for wrong channels or a size that the stride does not divide."""
        check_grid(image, self.encoder.channels, self.stride)
        return self.encoder(image).permute(0, 2, 3, 1).float()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """image [B,C,H,W] -> its reconstruction [B,C,H,W], z_e [B,h,w,D] and what the quantizer made of it."""
        encoded = self.encode(image)
        quantized = self.quantizer(encoded)
        return self.draw(quantized.passed), encoded, quantized

    def draw(self, vectors: Tensor) -> Tensor:
        """vectors [B,h,w,D] -> image [B,C,H,W]."""
        return self.decoder(vectors.permute(0, 3, 1, 2)).float()

    def ids(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] -> code numbers [B,h,w]."""
        return self.quantizer(self.encode(image)).ids

    def decode(self, ids: Tensor) -> Tensor:
        """ids [B,h,w] -> image [B,C,H,W]."""
        if ids.ndim != 3:
            raise UserError(f"codes of shape {list(ids.shape)}", "a grid of code numbers is [B,h,w]")
        return self.draw(self.quantizer.vectors(ids))


def check_grid(image: Tensor, channels: int, stride: int) -> None:
    """Raises UserError unless image is float [B,channels,H,W] with sides that `stride` divides."""
    check_image(image, channels)
    if image.shape[2] % stride or image.shape[3] % stride:
        raise UserError(f"an image of {image.shape[2]}x{image.shape[3]} pixels", f"this codec reads sides that are multiples of {stride}")


def small_codec() -> VQCodec.Config:
    """64 codes, a quarter of the side: that of `vq_vae` small, a Start of tiny masked models."""
    return VQCodec.Config(encoder=ConvEncoder.Config(width=64, hidden=32, out=16), decoder=ConvDecoder.Config(into=16, width=64, hidden=32),
                          quantizer=VectorQuantizer.Config(codes=64, width=16, decay=0.9, idle=0.05, std=0.5))
