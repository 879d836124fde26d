"""A text decoder in two halves (Yu et al. 2022, CoCa): the first reads words alone, the second words and a picture. B batch, L tokens, D width."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention, causal_mask
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.cache import Cache, LayerCache
from polysense.nn.check import check_text
from polysense.nn.drop import drop_path
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower

SEES = ("words", "released")


class Reading(Part):
    """x + attn(norm1(x); norm_source(source)), then + mlp(norm2(x)): a block that reads a source and nothing else, for the slots of a Transformer."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        heads: int = 0
        attn: Spec = field(default_factory=Attention.Config)
        mlp: Spec = field(default_factory=MLP.Config)
        norm: Spec = field(default_factory=LayerNorm.Config)
        drop_path: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm_source, self.norm2 = (build(c.norm, width=c.width) for _ in range(3))
        self.attn, self.mlp = build(c.attn, width=c.width, heads=c.heads), build(c.mlp, width=c.width)
        self.drop_path = c.drop_path

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
                causal: bool = False, cache: LayerCache | None = None, position: Tensor | None = None) -> Tensor:
        """x [B,L,D], source [B,S,D] -> [B,L,D]. Words meet words in the other blocks, so `mask`, `causal` and `cache` are theirs."""
        if source is None:
            raise UserError("this decoder reads a picture", "give it one")
        x = x + drop_path(self.attn(self.norm1(x), self.norm_source(source), mask=source_mask), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


def alternating(width: int, depth: int, heads: int, block: PreNorm.Config) -> Transformer.Config:
    """`depth` pairs of a block among words and one that reads the picture, each with an MLP of its own."""
    read = Reading.Config(attn=block.attn, mlp=block.mlp, norm=block.norm)
    return Transformer.Config(width=width, depth=2 * depth, heads=heads, block=(block, read) * depth, norm=block.norm)


class ClosedText(Tower):
    """Causal text whose feature is a learned token behind it. No word sees that token; it sees all words, and no padding.

    Its position is the last one, however long the texts of a batch are. tokens are not normed: the other half of the decoder goes on with them.
    `sees`: "words", or "released", as the weights of open_clip were trained: the token sees the first padding, but itself only behind a text
    that fills all places.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int                          # the most words it reads
        body: Transformer.Config
        pad: int = 0
        sees: str = "words"

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        if c.sees not in SEES:
            raise UserError(f"sees={c.sees!r}", f"choose one of {', '.join(SEES)}")
        self.embed, self.cls = nn.Embedding(c.vocab, c.width), nn.Parameter(torch.randn(c.width) * 0.01)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(1, c.length + 1, c.width) * 0.01)
        self.body = c.body.build()
        self.length, self.vocab, self.pad, self.sees, self.width = c.length, c.vocab, c.pad, c.sees, c.width

    def forward(self, text: Tensor) -> Encoded:
        """text [B,L] ids -> tokens [B,L,D], pooled [B,D], mask [B,L]: both of one pass. Raises UserError for a text longer than `length`."""
        check_text(text, self.length, self.vocab)
        many = text.shape[1]
        if self.sees == "released" and many < self.length:
            text = F.pad(text, (0, 1), value=self.pad)       # the padding that the token sees
        real, n = text != self.pad, text.shape[1]
        if self.sees == "released":
            valid = torch.cat([real.new_ones(len(text), 1), real[:, :-1], real[:, -1:] & (n == self.length)], 1)
        else:
            valid = torch.cat([real, real.new_ones(len(text), 1)], 1)
        x = torch.cat([self.embed(text) + self.position[:, :n], (self.cls + self.position[:, -1]).expand(len(text), 1, -1)], 1)
        x = self.body.layers(x, mask=causal_mask(n + 1, n + 1, text.device)[0] & valid[:, None])[-1]
        return Encoded(tokens=x[:, :many], pooled=self.body.norm(x[:, -1]), mask=real[:, :many])

    def read(self, text: Tensor, cache: Cache) -> Tensor:
        """text [B,L] ids that go on from those in the cache, all real -> tokens [B,L,D]: without the token behind, which no word sees."""
        start = cache.length
        check_text(text, self.length - start, self.vocab)
        return self.body.layers(self.embed(text) + self.position[:, start:start + text.shape[1]], causal=True, cache=cache)[-1]


class Telling:
    """A `decoding.Writer` of both halves: what is read, and the key-value caches of what was written."""

    def __init__(self, text: ClosedText, decoder: Transformer, words: nn.Module, source: Tensor, room: int):
        self.text, self.decoder, self.words, self.source = text, decoder, words, source
        self.caches = text.body.cache(len(source), room), decoder.cache(len(source), room)

    def read(self, text: Tensor) -> Tensor:
        """text [B,L] more ids -> logits [B,V] of the next."""
        said = self.text.read(text, self.caches[0])
        return self.words(self.decoder(said, self.source, causal=True, cache=self.caches[1])[:, -1])

    def __call__(self, token: Tensor) -> Tensor:
        return self.read(token[:, None])

    def pick(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.pick(rows)
        self.source = self.source[rows]
