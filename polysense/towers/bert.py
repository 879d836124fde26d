"""BERT. Shapes: B batch, L tokens, S source tokens, D width."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.nn.build import build
from polysense.nn.cache import Cache
from polysense.nn.check import check_text
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower


class Bert(Tower):
    """Bidirectional text encoder (Devlin et al. 2019): word + position + kind (segment), norm, post-norm blocks.

    The body is a Transformer of PostNorm blocks with `norm=None`. Padding (id `pad`) is never looked at. pooled is the last hidden state of the
    first token, [CLS]; put a TanhHead into `pooler` for BERT's own.

    Blocks with `cross` read a `source` (the tokens of a picture, or of a question); with `causal=True` the same tower is a decoder, and a
    `cache` (`tower.body.cache(batch, length)`) lets it read a text piece by piece.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int
        body: Transformer.Config
        norm_pre: Spec                       # of the embeddings, LayerNorm.Config(eps=1e-12) in BERT
        pad: int = 0
        kinds: int = 2                       # segments; 0: no embedding of them
        dropout: float = 0.0                 # of the embeddings
        pooler: Spec | None = None

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        self.embed, self.kind = nn.Embedding(c.vocab, c.width), nn.Embedding(c.kinds, c.width) if c.kinds else None
        self.position = nn.Parameter(torch.randn(1, c.length, c.width) * 0.02)
        for table in filter(None, (self.embed, self.kind)):
            nn.init.trunc_normal_(table.weight, std=0.02)
        self.norm_pre, self.dropout = build(c.norm_pre, width=c.width), nn.Dropout(c.dropout)
        self.body = c.body.build()
        self.pooler = c.pooler.build() if c.pooler is not None else None
        self.length, self.pad, self.width = c.length, c.pad, c.width

    def forward(self, text: Tensor, mask: Tensor | None = None, kind: Tensor | None = None, short: bool = False, *, source: Tensor | None = None,
                source_mask: Tensor | None = None, causal: bool = False, cache: Cache | None = None) -> Encoded:
        """text [B,L] ids; mask [B,L] True on real tokens (None: ids other than `pad`); kind [B,L] segments (None: all 0);
        short: only `pooled` is wanted, tokens are [B,1,D]; source [B,S,.] and source_mask [B,S] for cross-attention;
        causal: no token sees a later one; cache: text continues what the cache holds, all of it real tokens
        -> tokens [B,L,D], pooled [B,D], mask [B,L]. Raises UserError for a text longer than `length`."""
        start = 0 if cache is None else cache.length
        check_text(text, self.length - start, self.embed.num_embeddings)
        if mask is None and cache is None:
            mask = text != self.pad
        mask = None if mask is None else mask.bool()
        x = self.embed(text) + self.places(text, start)
        if self.kind is not None:
            x = x + (self.kind.weight[0] if kind is None else self.kind(kind))
        x = self.dropout(self.norm_pre(x))
        if source is None and not causal and cache is None:
            x = self.body(x, mask=mask, at=torch.zeros(len(x), dtype=torch.long, device=x.device) if short else None)
        else:
            x = self.body(x, source, mask=mask, source_mask=source_mask, causal=causal, cache=cache)
            x = x[:, :1] if short else x
        return Encoded(tokens=x, pooled=x[:, 0] if self.pooler is None else self.pooler(x[:, 0]), mask=None if short else mask)

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a deeper one the first blocks; a pooler stays behind where there is none here (Li et al. 2021, ALBEF, section 3.1)."""
        def wanted(name: str) -> bool:
            block = name.startswith("body.blocks.")
            return int(name.split(".")[2]) < len(self.body.blocks) if block else self.pooler is not None or not name.startswith("pooler.")
        return {k: v for k, v in weights.items() if wanted(k)}

    def places(self, text: Tensor, start: int) -> Tensor:
        """Hook: positions [1,L,D] or [B,L,D] of text [B,L] behind `start` tokens."""
        return self.position[:, start:start + text.shape[1]]

    def pooled(self, text: Tensor, /) -> Tensor:
        """text [B,L] -> `self(text).pooled` [B,D], the same numbers for less."""
        return self(text, short=True).pooled
