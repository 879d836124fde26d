"""BERT. Shapes: B batch, L tokens, D width."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.nn.build import build
from polysense.nn.check import check_text
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower


class Bert(Tower):
    """Bidirectional text encoder (Devlin et al. 2019): word + position + kind (segment), norm, post-norm blocks.

    The body is a Transformer of PostNorm blocks with `norm=None`. Padding (id `pad`) is never looked at. pooled is the last hidden state of the
    first token, [CLS]; put a TanhHead into `pooler` for BERT's own.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int
        body: Transformer.Config
        norm_pre: Spec                       # of the embeddings, LayerNorm.Config(eps=1e-12) in BERT
        pad: int = 0
        kinds: int = 2                       # segments
        dropout: float = 0.0                 # of the embeddings
        pooler: Spec | None = None

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        self.embed, self.kind = nn.Embedding(c.vocab, c.width), nn.Embedding(c.kinds, c.width)
        self.position = nn.Parameter(torch.randn(1, c.length, c.width) * 0.02)
        for table in (self.embed, self.kind):
            nn.init.trunc_normal_(table.weight, std=0.02)
        self.norm_pre, self.dropout = build(c.norm_pre, width=c.width), nn.Dropout(c.dropout)
        self.body = c.body.build()
        self.pooler = c.pooler.build() if c.pooler is not None else None
        self.length, self.pad, self.width = c.length, c.pad, c.width

    def forward(self, text: Tensor, mask: Tensor | None = None, kind: Tensor | None = None, short: bool = False) -> Encoded:
        """text [B,L] ids; mask [B,L] True on real tokens (None: ids other than `pad`); kind [B,L] segments (None: all 0);
        short: only `pooled` is wanted, tokens are [B,1,D]
        -> tokens [B,L,D], pooled [B,D], mask [B,L]. Raises UserError for a text longer than `length`."""
        check_text(text, self.length, self.embed.num_embeddings)
        mask = text != self.pad if mask is None else mask.bool()
        kinds = self.kind.weight[0] if kind is None else self.kind(kind)
        x = self.dropout(self.norm_pre(self.embed(text) + self.position[:, :text.shape[1]] + kinds))
        x = self.body(x, mask=mask, at=torch.zeros(len(x), dtype=torch.long, device=x.device) if short else None)
        return Encoded(tokens=x, pooled=x[:, 0] if self.pooler is None else self.pooler(x[:, 0]), mask=None if short else mask)

    def pooled(self, text: Tensor, /) -> Tensor:
        """text [B,L] -> `self(text).pooled` [B,D], the same numbers for less."""
        return self(text, short=True).pooled
