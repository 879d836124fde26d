"""The Transformer of 2017: an encoder and a decoder. Shapes: B batch, S source tokens, L tokens of the other text, D width, V vocabulary."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.block import PostNorm
from polysense.nn.cache import Cache
from polysense.nn.check import check_text
from polysense.nn.init import XavierInit
from polysense.nn.mlp import MLP
from polysense.nn.position import sincos, sincos_pairs
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower
from polysense.towers.seq2seq import write

ORDERS = {"pairs": sincos_pairs, "halves": lambda width, length: sincos(width, torch.arange(length)).float()}


class WordBias(Part):
    """A learned number added to the logits of each word (Marian); the Transformer of 2017 has none."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int

    def __init__(self, c: Config):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(c.vocab))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


class Translator(Tower):
    """Vaswani et al. 2017: one matrix `embed` is the embedding of both texts, times sqrt(D), and the output layer; fixed sinusoids tell places;
    blocks of the decoder read the encoder's states. Both bodies are of post-norm blocks without a final norm.

    `order`: how the sinusoids lie in the width, "pairs" sin cos sin cos (the paper), or "halves", all sines first (Marian).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int                          # of either text
        encoder: Transformer.Config
        decoder: Transformer.Config          # its blocks have `cross`
        start: int = 1                       # id that the decoder begins with
        pad: int = 0
        dropout: float = 0.1                 # of embedding and place together
        order: str = "pairs"
        correct: Spec | None = None          # a WordBias on the logits

        @property
        def width(self) -> int:
            return self.encoder.width

    place: Tensor

    def __init__(self, c: Config):
        super().__init__()
        if c.order not in ORDERS or c.decoder.width != c.encoder.width or c.width % 2:
            raise UserError(f"widths {c.encoder.width} and {c.decoder.width}, sinusoids in {c.order!r}",
                            f"both halves share one even width; the order is one of {', '.join(ORDERS)}")
        self.embed = nn.Embedding(c.vocab, c.width)
        nn.init.normal_(self.embed.weight, std=c.width ** -0.5)      # so that a word times sqrt(D) is as large as its place
        self.register_buffer("place", ORDERS[c.order](c.width, c.length), persistent=False)
        self.encoder, self.decoder = c.encoder.build(), c.decoder.build()
        self.correct = c.correct.build() if c.correct is not None else None
        self.dropout = nn.Dropout(c.dropout)
        self.width, self.vocab, self.length, self.begin, self.pad = c.width, c.vocab, c.length, c.start, c.pad

    def words(self, text: Tensor, start: int = 0) -> Tensor:
        """text [B,L] ids that stand behind `start` others -> [B,L,D]: sqrt(D) embedding + place. UserError for ids or lengths out of range."""
        check_text(text, self.length - start, self.vocab)
        return self.dropout(self.embed(text) * self.width ** 0.5 + self.place[start:start + text.shape[1]])

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Encoded:
        """text [B,S] ids, mask [B,S] True on real tokens (None: ids other than `pad`) -> the encoder's states [B,S,D], their mean [B,D], mask."""
        x = self.words(text)
        mask = text != self.pad if mask is None else mask.bool()
        x = self.encoder(x, mask=mask | ~mask.any(1, keepdim=True))           # an empty text would be a softmax of nothing
        real = mask[..., None]
        return Encoded(tokens=x, pooled=(x * real).sum(1) / real.sum(1).clamp(min=1), mask=mask)

    def decode(self, text: Tensor, source: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """text [B,L] ids that go on from those in the cache, source [B,S,D] of the encoder, its mask [B,S] -> hidden [B,L,D].

        A token sees itself and those before it, no padding; with a cache all tokens are real.
        """
        start = 0 if cache is None else cache.length
        real = None if cache is not None else (text != self.pad) | (torch.arange(text.shape[1], device=text.device) == 0)   # the first may be `pad`
        return self.decoder(self.words(text, start), source, mask=real, source_mask=mask, causal=True, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] of `decode` -> [...,V], by the embedding."""
        out = nn.functional.linear(hidden, self.embed.weight)
        return out if self.correct is None else self.correct(out)

    @torch.no_grad()
    def generate(self, text: Tensor, mask: Tensor | None = None, *, max_new: int, end: int | None, how: Spec | None = None) -> Tensor:
        """text [B,S] ids, mask [B,S] -> ids [B,N] of the other text, N <= max_new, up to and with `end`, then `pad`; `how` as `Seq2Seq.generate`."""
        seen = self(text, mask)
        return write(self, seen.tokens, seen.mask, max_new=min(max_new, self.length), end=end, pad=self.pad, how=how)


def halves(width: int, depth: int, heads: int, hidden: int, dropout: float, act: str = "relu") -> tuple[Transformer.Config, Transformer.Config]:
    """Encoder and decoder of post-norm blocks, dropout on what each branch says."""
    block = PostNorm.Config(mlp=MLP.Config(hidden=hidden, act=act), dropout=dropout)
    body = Transformer.Config(width=width, depth=depth, heads=heads, block=block, norm=None, init=XavierInit.Config())
    return body, body.but(block=block.but(cross=Attention.Config()))
