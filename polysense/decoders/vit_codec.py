"""A codec of transformers whose codes are directions. Shapes: B batch, P patch, h w places, D width, Z width of a code, K codes."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.vq_codec import Codebook, Quantized, check_codes
from polysense.nn.patch import Patches
from polysense.nn.position import fit_positions
from polysense.nn.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Side(Spec):
    """What encoder and decoder are made of."""
    patch: int
    side: int                                # places along a side that positions are learned for; other grids interpolate them
    body: Transformer.Config
    code: int                                # Z
    project: Spec                            # behind the body: of the encoder D -> Z, of the decoder D -> 3 P P


class ViTEncoder(Part):
    """Patches, positions, transformer, `project` down to the width of a code: [B,3,H,W] -> [B,Z,h,w] (Yu et al. 2022, section 3.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Side):
        pass

    def __init__(self, c: Config):
        super().__init__()
        self.patch, self.body, self.project = Patches(3, c.body.width, c.patch), c.body.build(), c.project.build()
        self.position = nn.Parameter(torch.randn(1, c.side ** 2, c.body.width) * 0.02)
        self.stride, self.channels = c.patch, 3

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image)
        grid = (x.shape[1], x.shape[2])
        x = self.project(self.body(x.flatten(1, 2) + fit_positions(self.position, 0, grid)))
        return x.transpose(1, 2).unflatten(2, grid)


class ViTDecoder(Part):
    """The mirror: codes up to the width of the transformer (`spread`), positions, transformer, `project` to the pixels of each patch.

    `log_scale` [3]: how far the pixels of each colour lie from what is drawn, ln b of their likelihood.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Side):
        pass

    def __init__(self, c: Config):
        super().__init__()
        self.spread, self.body, self.project = nn.Linear(c.code, c.body.width), c.body.build(), c.project.build()
        self.position = nn.Parameter(torch.randn(1, c.side ** 2, c.body.width) * 0.02)
        self.log_scale, self.patch = nn.Parameter(torch.zeros(3)), c.patch

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B,Z,h,w] -> image [B,3,H,W]."""
        grid = (codes.shape[2], codes.shape[3])
        x = self.spread(codes.flatten(2).transpose(1, 2)) + fit_positions(self.position, 0, grid)
        return F.pixel_shuffle(self.project(self.body(x)).transpose(1, 2).unflatten(2, grid), self.patch)


class CosineQuantizer(Part):
    """k = argmax_j cos(z, e_j): both are normalised, so the nearest by distance is the one of the same direction. What goes on is the normalised
    code; its gradient goes straight through to the normalised z (Yu et al. 2022, section 3.2). `codebook` [K,Z] is a parameter."""

    count: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Codebook):
        pass

    def __init__(self, c: Config):
        super().__init__()
        if c.codes < 1 or c.width < 1:
            raise UserError(f"{c.codes} codes of width {c.width}", "there is one code at least, of one number at least")
        self.codes, self.width = c.codes, c.width
        self.codebook = nn.Parameter(torch.randn(c.codes, c.width))
        self.register_buffer("count", torch.ones(c.codes))

    def forward(self, encoded: Tensor) -> Quantized:
        """encoded [...,Z] of any length -> Quantized, in float32; `vectors` are of unit length, with the gradient of the codebook."""
        with torch.autocast(encoded.device.type, enabled=False):
            z, book = F.normalize(encoded.float(), dim=-1), F.normalize(self.codebook.float(), dim=-1)
            with torch.no_grad():
                ids = (z @ book.T).argmax(-1)
            vectors = F.embedding(ids, book)
            return Quantized(ids, vectors, z + (vectors - z).detach())

    def vectors(self, ids: Tensor) -> Tensor:
        """ids [...] -> code vectors [...,Z] of unit length. Raises UserError for what is no code."""
        check_codes(ids, self.codes)
        return F.normalize(F.embedding(ids, self.codebook.float()), dim=-1)

    @torch.no_grad()
    def move(self, encoded: Tensor, ids: Tensor, step: int = 0) -> None:
        """Only counts how often each code was given: gradients move the codebook."""
        self.count.lerp_(torch.bincount(ids.flatten(), minlength=self.codes).float(), 0.01)
