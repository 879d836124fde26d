"""From hidden states back to words. Shapes: D width, V vocabulary."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.activation import activation
from polysense.nn.build import build
from polysense.nn.norm import LayerNorm


class WordHead(Part):
    """BERT's word predictor: norm(act(pre x)) E^T + bias, E being the word embeddings, which it shares (Devlin et al. 2019, released code)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner, as vocab
        vocab: int = 0
        act: str = "gelu"
        norm: Spec = field(default_factory=lambda: LayerNorm.Config(eps=1e-12))

    def __init__(self, c: Config):
        super().__init__()
        self.pre, self.norm, self.act = nn.Linear(c.width, c.width), build(c.norm, width=c.width), activation(c.act)
        nn.init.trunc_normal_(self.pre.weight, std=0.02)
        nn.init.zeros_(self.pre.bias)
        self.bias = nn.Parameter(torch.zeros(c.vocab))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [...,D], embedding [V,D] -> logits [...,V]."""
        return F.linear(self.norm(self.act(self.pre(x))), embedding, self.bias)


class OwnWordHead(WordHead):
    """The same with words of its own, `table` [V,D], which the embeddings do not share (VLMo, released code)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(WordHead.Config):
        pass

    def __init__(self, c: Config):
        super().__init__(c)
        self.table = nn.Parameter(torch.randn(c.vocab, c.width) * 0.02)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return super().forward(x, self.table)


class PlainWordHead(Part):
    """W x + b, not shared with the embeddings (BEiT-3, released code)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        vocab: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.out = nn.Linear(c.width, c.vocab)
        nn.init.trunc_normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """As WordHead's."""
        return self.out(x)
