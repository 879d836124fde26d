"""Encoder-decoder language models. Shapes: B batch, S T source tokens, L tokens of text, P prefix, D width, V vocabulary.

Interface (masks are True on real tokens; a source may be padded anywhere, a text on the right):

    lm(text, mask) -> Encoded          lm.embed(text) -> [B,L,D]              lm.read(x, mask) -> source [B,S,D]
    lm.decode(text, source, mask) -> hidden [B,L,D]                           lm.logits(hidden) -> [B,L,V]
    lm.join(prefix, text, mask) -> x, mask                                    lm.predict(text, x, mask) -> logits [B,1+L,V]
    lm.generate(x, mask, max_new=, end=, how=) -> ids [B,N]
"""
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Configured, Spec
from polysense.nn.block import PreNorm
from polysense.nn.cache import Cache
from polysense.nn.check import check_text
from polysense.nn.distance import DistanceBias, UnscaledAttention
from polysense.nn.head import Linear
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.norm import RMSNorm
from polysense.nn.transformer import Transformer
from polysense.towers.decoding import Greedy
from polysense.towers.encoded import Encoded, Tower


class T5Init(Configured):
    """T5's (released code): deviation (D H)^-1/2 of queries, H being the head width, and 1 / sqrt(what it reads) of every other linear."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        pass

    def __call__(self, body: nn.Module) -> None:
        for m in body.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features ** -0.5)
            if isinstance(m, UnscaledAttention):
                nn.init.normal_(m.q.weight, std=(m.q.in_features * m.head_width) ** -0.5)


class Seq2Seq(Tower):
    """T5 (Raffel et al. 2020): an encoder sees all of its text, a decoder writes another one, reading the encoder's states in every block.

    Both embed words with `embed`, know only distances between tokens (`encoder_bias`, `decoder_bias`, one table for all blocks of each) and end
    with a norm. `head` predicts words; where it is None, the embedding does, from states divided by sqrt(D).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        encoder: Transformer.Config
        decoder: Transformer.Config          # its blocks have `cross`
        head: Spec | None = None             # Linear.Config [D -> V]; None: the transposed embedding (tied)
        buckets: int = 32
        furthest: int = 128
        start: int = 0                       # id that the decoder begins with

        @property
        def width(self) -> int:
            return self.encoder.width

    def __init__(self, c: Config):
        super().__init__()
        if c.decoder.width != c.encoder.width:
            raise UserError(f"an encoder of width {c.encoder.width} and a decoder of {c.decoder.width}", "they share their word embeddings")
        self.embed = nn.Embedding(c.vocab, c.width)
        self.encoder, self.decoder = c.encoder.build(), c.decoder.build()
        self.encoder_bias, self.decoder_bias = (DistanceBias.Config(heads=body.heads, buckets=c.buckets, furthest=c.furthest, ways=ways,
                                                                    std=c.width ** -0.5).build()
                                                for body, ways in ((c.encoder, "both"), (c.decoder, "back")))
        self.head = c.head.build() if c.head is not None else None
        self.width, self.vocab, self.begin = c.width, c.vocab, c.start

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Encoded:
        """text [B,L] ids, mask [B,L] (None: all are real) -> tokens [B,L,D] of the encoder, pooled [B,D] (their mean over real ones), mask."""
        check_text(text, text.shape[-1], self.vocab)
        tokens = self.read(self.embed(text), mask)
        real = torch.ones_like(text, dtype=torch.bool) if mask is None else mask
        return Encoded(tokens=tokens, pooled=(tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1), mask=mask)

    def read(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings x [B,S,D], mask [B,S] -> states of the encoder [B,S,D], normed."""
        bias = self.encoder_bias(x.shape[1], x.shape[1])
        return self.encoder(x, mask=bias if mask is None else bias.masked_fill(~mask[:, None, None], -torch.inf))

    def decode(self, text: Tensor, source: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """text [B,L] ids that go on from those in the cache, source [B,S,D] of `read`, its mask [B,S] -> hidden [B,L,D], normed."""
        check_text(text, text.shape[-1], self.vocab)
        past = 0 if cache is None else cache.length
        bias = self.decoder_bias(text.shape[1], past + text.shape[1])
        return self.decoder(self.embed(text), source, mask=bias, source_mask=mask, causal=True, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] of `decode` -> [...,V]."""
        return nn.functional.linear(hidden * self.width ** -0.5, self.embed.weight) if self.head is None else self.head(hidden)

    def join(self, prefix: Tensor, text: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Soft prompts [B,P,D] in front of text [B,L], mask [B,L] -> x [B,P+L,D], mask [B,P+L] or None."""
        check_text(text, text.shape[-1], self.vocab)
        x = torch.cat([prefix, self.embed(text).to(prefix.dtype)], 1)
        return x, None if mask is None else torch.cat([mask.new_ones(prefix.shape[:2]), mask], 1)

    def predict(self, text: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeddings x [B,S,D] for the encoder, their mask [B,S], text [B,L] -> logits [B,1+L,V]: behind the decoder's first id, and every token."""
        begun = torch.full_like(text[:, :1], self.begin)
        return self.logits(self.decode(torch.cat([begun, text], 1), self.read(x, mask), mask))

    @torch.no_grad()
    def generate(self, x: Tensor, mask: Tensor | None = None, *, max_new: int, end: int | None, pad: int = 0, how: Spec | None = None) -> Tensor:
        """Replies to embeddings x [B,S,D] (mask [B,S]) -> new ids [B,N], N <= max_new, up to and with `end`, then `pad`.

        The encoder reads once, the decoder keeps keys and values of what it wrote. how: a strategy of `towers.decoding`, greedy by default.
        """
        return write(self, self.read(x, mask), mask, max_new=max_new, end=end, pad=pad, how=how)


class Decodes(Protocol):
    """A decoder that reads a source: T5's, and the one of 2017."""
    decoder: Any                                         # a Transformer
    begin: int

    def decode(self, text: Tensor, source: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


def write(lm: Decodes, source: Tensor, mask: Tensor | None, *, max_new: int, end: int | None, pad: int = 0, how: Spec | None = None) -> Tensor:
    """States source [B,S,D], mask [B,S] -> new ids [B,N], N <= max_new, up to and with `end`, then `pad`; see `Seq2Seq.generate`."""
    if max_new < 1:
        raise UserError(f"max_new={max_new}", "ask for at least one token")
    writer = SourceWriter(lm, source, mask, lm.decoder.cache(len(source), max_new))
    logits = writer(torch.full((len(source),), lm.begin, dtype=torch.int64, device=source.device))
    if not bool(logits.isfinite().all()):
        raise UserError("the language model returned numbers that are not finite", "the weights or the picture are damaged")
    return (how or Greedy.Config()).build()(logits, writer, max_new=max_new, end=end, pad=pad)


class SourceWriter:
    """A `decoding.Writer`: the decoder, the states it reads, and the cache of what it has written."""

    def __init__(self, lm: Decodes, source: Tensor, mask: Tensor | None, cache: Cache):
        self.lm, self.source, self.mask, self.cache = lm, source, mask, cache

    def __call__(self, token: Tensor) -> Tensor:
        """token [B] -> logits [B,V] of the next."""
        return self.lm.logits(self.lm.decode(token[:, None], self.source, self.mask, self.cache)[:, -1])

    def pick(self, rows: Tensor) -> None:
        self.cache.pick(rows)
        self.source, self.mask = self.source[rows], None if self.mask is None else self.mask[rows]


def _t5(vocab: int, width: int, depth: int, heads: int, head_width: int, mlp: Spec, head: Spec | None, dropout: float) -> Seq2Seq.Config:
    attn, norm = UnscaledAttention.Config(bias="", head_width=head_width, dropout=dropout), RMSNorm.Config(eps=1e-6)
    reads = PreNorm.Config(attn=attn, mlp=mlp, norm=norm, dropout=dropout)
    body = Transformer.Config(width=width, depth=depth, heads=heads, block=reads, norm=norm, init=T5Init.Config())
    return Seq2Seq.Config(vocab=vocab, encoder=body, decoder=body.but(block=reads.but(cross=attn)), head=head)


def t5(*, vocab: int, width: int, depth: int, heads: int, hidden: int, head_width: int = 64, dropout: float = 0.0) -> Seq2Seq.Config:
    """T5 (2020): ReLU, tied head. `depth` blocks in each half."""
    return _t5(vocab, width, depth, heads, head_width, MLP.Config(hidden=hidden, act="relu", bias="", dropout=dropout), None, dropout)


def flan_t5(*, vocab: int, width: int, depth: int, heads: int, hidden: int, head_width: int = 64, dropout: float = 0.0) -> Seq2Seq.Config:
    """T5 1.1 and FlanT5 (Chung et al. 2022): a gated GELU, an untied head."""
    return _t5(vocab, width, depth, heads, head_width, GatedMLP.Config(hidden=hidden, act="gelu_tanh", dropout=dropout),
               Linear.Config(into=width, out=vocab, std=width ** -0.5), dropout)
