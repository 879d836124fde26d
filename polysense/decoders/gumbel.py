"""Codes drawn from a softmax, each with a vector of its own. Shapes: B batch, h w grid, K codes, D width of a code."""
from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.system import Part
from polysense.decoders.vq_codec import Codebook, Quantized, check_codes


class GumbelQuantizer(Part):
    """In place of the nearest code: logits of all of them (`head`), of which training draws one through the Gumbel-softmax relaxation, hard in the
    forward pass and soft in the backward (Jang et al. 2017; Esser et al. 2021, released code). In use the code is the argmax of the logits.

    `codebook` [K,D] learns from what is made of the pictures alone. The temperature falls by a cosine, in `cool`.
    """

    temperature: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Codebook):
        temperature: tuple[float, float] = (1.0, 1 / 16)

    def __init__(self, c: Config):
        super().__init__()
        if min(c.temperature) <= 0:
            raise UserError(f"temperature={c.temperature}", "both its start and its end are above zero")
        self.codes, self.width, self.range = c.codes, c.width, c.temperature
        self.head, self.codebook = nn.Linear(c.width, c.codes), nn.Parameter(torch.randn(c.codes, c.width))
        self.register_buffer("temperature", torch.tensor(c.temperature[0]))

    def logits(self, encoded: Tensor) -> Tensor:
        """encoded [...,D] -> [...,K], float32."""
        return self.head(encoded).float()

    def forward(self, encoded: Tensor) -> Quantized:
        """encoded [...,D] -> Quantized; `vectors` and `passed` are the same, as no term compares them with what the encoder said."""
        logits = self.logits(encoded)
        if not self.training:
            ids = logits.argmax(-1)
            vectors = F.embedding(ids, self.codebook.float())
            return Quantized(ids, vectors, vectors)
        hard = F.gumbel_softmax(logits, float(self.temperature), hard=True)
        vectors = hard @ self.codebook.float()
        return Quantized(hard.argmax(-1), vectors, vectors)

    def vectors(self, ids: Tensor) -> Tensor:
        """ids [...] -> code vectors [...,D]. Raises UserError for what is no code."""
        check_codes(ids, self.codes)
        return F.embedding(ids, self.codebook.float())

    @torch.no_grad()
    def cool(self, progress: float) -> None:
        """The temperature at this fraction of the stage."""
        start, end = self.range
        self.temperature.fill_(end + (start - end) * (1 + cos(pi * min(max(progress, 0.0), 1.0))) / 2)
