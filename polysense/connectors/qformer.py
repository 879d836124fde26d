"""The Q-Former: learned queries that read a picture, and may meet a text. Shapes: B batch, Q queries, S image tokens, L text tokens, D width."""
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.check import check_text
from polysense.nn.init import NormalInit
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm


class Looked(NamedTuple):
    """`states`: the queries [B,Q,D] as they enter each block; `query` [B,Q,D]: as they leave the last."""
    states: list[Tensor]
    query: Tensor


class QBlock(Part):
    """One post-norm layer of BERT that queries and text share up to its self-attention; behind it queries read the picture (where the block has
    `cross`) and each of the two has a feed-forward half of its own: `mlp norm2` the text, `mlp_query norm_query` the queries."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        attn: Spec
        mlp: Spec
        norm: Spec
        cross: Spec | None                   # of the queries alone
        text: Spec | None                    # the text's MLP.Config; None: no text is ever read
        dropout: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.norm1 = c.attn.build(), build(c.norm, width=c.width)
        self.cross = c.cross.build() if c.cross is not None else None
        self.norm_cross = build(c.norm, width=c.width) if c.cross is not None else None
        self.mlp_query, self.norm_query = build(c.mlp, width=c.width), build(c.norm, width=c.width)
        self.mlp = build(c.text, width=c.width) if c.text is not None else None
        self.norm2 = build(c.norm, width=c.width) if c.text is not None else None
        self.dropout = c.dropout

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def mix(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Self-attention of x [B,T,D], which may also look at source [B,S,D] (and at itself, where that is part of it)."""
        return self.norm1(x + self._drop(self.attn(x, source, mask=mask)))

    def ask(self, query: Tensor, image: Tensor) -> Tensor:
        """The queries' half: cross-attention to image [B,S,.] and their feed-forward."""
        if self.cross is not None and self.norm_cross is not None:
            query = self.norm_cross(query + self._drop(self.cross(query, image)))
        return self.norm_query(query + self._drop(self.mlp_query(query)))

    def say(self, text: Tensor) -> Tensor:
        """The text's half."""
        if self.mlp is None or self.norm2 is None:
            raise UserError("this Q-Former has no text part", "use one that is configured with a vocabulary")
        return self.norm2(text + self._drop(self.mlp(text)))


class QFormer(Part):
    """BERT with 32 learned queries (Li et al. 2023, BLIP-2, section 3.1 and figure 2).

    Self-attention is shared by queries and text; queries alone read the picture, in every second block; text reaches it only through them.
    Three ways to see: "own", queries and text each see their own kind; "all", everything sees everything; "causal", queries see queries, a
    text token sees all queries and the text up to itself. Under the first and the last the queries never depend on the text, so they are
    computed once, by `look`, and what they were in every block is handed on to the text: the same numbers bit for bit.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        queries: int = 32
        width: int = 768
        depth: int = 12
        heads: int = 12
        source: int                          # width of the image tokens
        every: int = 2                       # blocks 0, every, 2 every, ... have cross-attention
        vocab: int = 0                       # 0: no text part
        length: int = 512
        pad: int = 0
        mlp: Spec = field(default_factory=MLP.Config)
        norm: Spec = field(default_factory=lambda: LayerNorm.Config(eps=1e-12))
        dropout: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, c.queries, c.width) * 0.02)
        self.norm_pre, self.dropout = build(c.norm, width=c.width), nn.Dropout(c.dropout)
        attn = Attention.Config(width=c.width, heads=c.heads, dropout=c.dropout)
        text = c.mlp if c.vocab else None
        self.blocks: Any = nn.ModuleList(QBlock.Config(
            width=c.width, attn=attn, mlp=c.mlp, norm=c.norm, text=text, dropout=c.dropout,
            cross=attn.but(source=c.source) if i % c.every == 0 else None).build() for i in range(c.depth))
        NormalInit.Config().build()(self)
        self.embed = self.position = None
        if c.vocab:
            self.embed, self.position = nn.Embedding(c.vocab, c.width), nn.Parameter(torch.randn(1, c.length, c.width) * 0.02)
            nn.init.trunc_normal_(self.embed.weight, std=0.02)
            for block in self.blocks:        # the queries' feed-forward is born as a copy of the text's (released code)
                block.mlp_query.load_state_dict(block.mlp.state_dict())
        self.queries, self.width, self.length, self.pad = c.queries, c.width, c.length, c.pad

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a BERT as deep as this (Li et al. 2023, section 3.1): its self-attention for both, its feed-forward half for the text and, copied, for
        the queries. Queries, cross-attention and the ids behind its vocabulary stay as they are; it has no segments here (released code)."""
        if 1 + max((int(k.split(".")[2]) for k in weights if k.startswith("body.blocks.")), default=-1) != len(self.blocks):
            return weights
        out = self.state_dict()
        for name, value in weights.items():
            name = name.removeprefix("body.")
            if name in out:
                out[name] = torch.cat([value, out[name][len(value):]]) if name == "embed.weight" else value
        for name in [n for n in out if "_query." in n]:
            out[name] = out[name.replace("mlp_query.", "mlp.").replace("norm_query.", "norm2.")]
        return out

    def words(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> embeddings [B,L,D], normed. UserError without a text part and for what is no text."""
        if self.embed is None or self.position is None:
            raise UserError("this Q-Former has no text part", "use one that is configured with a vocabulary")
        check_text(text, self.length, self.embed.num_embeddings)
        return self.dropout(self.norm_pre(self.embed(text) + self.position[:, :text.shape[1]]))

    def start(self, image: Tensor) -> Tensor:
        """The queries for image [B,S,.] -> [B,Q,D], normed."""
        return self.dropout(self.norm_pre(self.query)).expand(len(image), -1, -1)

    def look(self, image: Tensor) -> Looked:
        """The queries alone read image tokens [B,S,source]."""
        states, x = list[Tensor](), self.start(image)
        for block in self.blocks:
            states.append(x)
            x = block.ask(block.mix(x), image)
        return Looked(states, x)

    def say(self, text: Tensor, seen: Looked | None = None) -> Tensor:
        """text [B,L] ids -> [B,L,D]: alone and in both directions ("own"), or, given what the queries saw, from left to right ("causal")."""
        x, real = self.words(text), text != self.pad
        if seen is None:
            for block in self.blocks:
                x = block.say(block.mix(x, mask=real))
            return x
        length, queries = text.shape[1], seen.query.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=text.device).tril() & real[:, None]
        mask = torch.cat([earlier.new_ones(len(text), length, queries), earlier], 2)
        for block, state in zip(self.blocks, seen.states, strict=True):
            x = block.say(block.mix(x, torch.cat([state, x], 1), mask))
        return x

    def both(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens [B,S,source] and text [B,L], everything sees everything ("all") -> queries [B,Q,D] and text [B,L,D]."""
        query, x = self.start(image), self.words(text)
        n, real = query.shape[1], torch.cat([text.new_ones(len(text), query.shape[1], dtype=torch.bool), text != self.pad], 1)
        for block in self.blocks:
            z = block.mix(torch.cat([query, x], 1), mask=real)
            query, x = block.ask(z[:, :n], image), block.say(z[:, n:])
        return query, x

    def forward(self, image: Tensor, text: Tensor | None = None, see: str = "own") -> tuple[Tensor, Tensor | None]:
        """image [B,S,source], text [B,L] -> queries [B,Q,D] and text [B,L,D] (None without) under one of the three masks."""
        if see not in ("own", "all", "causal"):
            raise UserError(f"no mask called {see!r}", "it is own, all or causal")
        if see == "all" and text is not None:
            return self.both(image, text)
        seen = self.look(image)
        return seen.query, None if text is None else self.say(text, seen if see == "causal" else None)
