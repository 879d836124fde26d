"""BEiT v2's tokenizer: a picture as code numbers that say what a teacher's features would. Shapes: B batch, h w grid, K codes, D width of a code."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.vq_codec import Quantized
from polysense.nn.build import build
from polysense.nn.head import TanhHead

ROUNDS = 10                                  # of k-means


class UnitQuantizer(Part):
    """k = argmax_j cos(z, e_j), with a straight-through gradient (Peng et al. 2022, BEiT v2, equations 1 and 2).

    `codebook` [K,D], a buffer of unit vectors: no gradient reaches it. The first `move` puts it on the centres of k-means over the vectors of that
    step; every later one moves each code that was chosen towards the mean of what chose it, e <- norm(g e + (1 - g) norm(mean z)), and leaves the
    others where they are. `count` [K] is the running number of vectors a step assigned to each code.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codes: int = 0                       # 0: set by the owner, as width
        width: int = 0
        decay: float = 0.99

    codebook: Tensor
    count: Tensor
    begun: Tensor

    def __init__(self, c: Config):
        super().__init__()
        if not 0 <= c.decay <= 1 or c.codes < 1:
            raise UserError(f"codes={c.codes}, decay={c.decay} make no codebook", "there is one code at least, the decay lies between 0 and 1")
        self.codes, self.width, self.decay = c.codes, c.width, c.decay
        self.register_buffer("codebook", F.normalize(torch.randn(c.codes, c.width), dim=-1))
        self.register_buffer("count", torch.zeros(c.codes))
        self.register_buffer("begun", torch.tensor(0.0))

    def forward(self, encoded: Tensor) -> Quantized:
        """encoded [...,D] of any length -> Quantized, in float32; `passed` has the gradient of the normalised vectors."""
        with torch.autocast(encoded.device.type, enabled=False):
            z = F.normalize(encoded.float(), dim=-1)
            ids = (z.detach() @ self.codebook.T).argmax(-1)
            vectors = F.embedding(ids, self.codebook)
            return Quantized(ids, vectors, z + (vectors - z).detach())

    @torch.no_grad()
    def move(self, encoded: Tensor, ids: Tensor, step: int = 0) -> None:
        """One step without gradient, from the vectors [...,D] of a step and the codes [...] they were given; `step` seeds the choice of the first
        centres, so that equal ranks agree."""
        z, ids = F.normalize(encoded.reshape(-1, self.width).float(), dim=-1), ids.flatten()
        if not self.begun:
            self.codebook.copy_(spherical_kmeans(z, self.codes, step))
            self.begun.fill_(1.0)
            ids = (z @ self.codebook.T).argmax(-1)
        fresh = torch.bincount(ids, minlength=self.codes).float()
        self.count.lerp_(fresh, 1 - self.decay)
        used = fresh > 0
        mean = F.normalize(torch.zeros_like(self.codebook).index_add_(0, ids, z), dim=-1)
        self.codebook[used] = F.normalize(torch.lerp(mean, self.codebook, self.decay), dim=-1)[used]


def spherical_kmeans(z: Tensor, codes: int, seed: int) -> Tensor:
    """Centres [K,D] of unit vectors z [N,D] by cosine; of fewer vectors than codes, some with a little noise. A centre that loses all stays."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(z), generator=generator).repeat(-(-codes // len(z)))[:codes].to(z.device)
    noise = torch.randn(codes, z.shape[1], generator=generator).to(z.device) * (0.01 if codes > len(z) else 0.0)
    centres = F.normalize(z[rows] + noise, dim=-1)
    for _ in range(ROUNDS):
        ids = (z @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, ids, z)
        some = sums.norm(dim=-1) > 1e-6
        centres = torch.where(some[:, None], F.normalize(sums, dim=-1), centres)
    return centres


class UnitCodec(Part):
    """Tower, two layers with tanh between them down to `width`, quantizer: all that others need to name a picture's codes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        encoder: Spec                        # a ViT.Config
        codes: int
        width: int
        quantizer: UnitQuantizer.Config = UnitQuantizer.Config()

    def __init__(self, c: Config):
        super().__init__()
        self.encoder, into = c.encoder.build(), c.encoder.width  # type: ignore[attr-defined]
        self.narrow = TanhHead.Config(into=into, hidden=into, out=c.width).build()
        self.quantizer: UnitQuantizer = build(c.quantizer, codes=c.codes, width=c.width)
        self.codes, self.stride = c.codes, c.encoder.patch  # type: ignore[attr-defined]

    def encode(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> vectors before they are normalised, [B,h,w,D]."""
        grid = self.encoder.grid_of(image)
        return self.narrow(self.encoder(image).tokens[:, self.encoder.prefix:]).unflatten(1, grid)

    def forward(self, image: Tensor) -> tuple[Tensor, Quantized]:
        encoded = self.encode(image)
        return encoded, self.quantizer(encoded)

    def ids(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> code numbers [B,h,w]."""
        return self.quantizer(self.encode(image)).ids
