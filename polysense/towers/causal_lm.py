"""Decoder-only language models. Shapes: B batch, L T tokens, P prefix, D width, V vocabulary.

Interface (everything takes token ids or embeddings, and masks that are True on real tokens; padding may stand left or right):

    lm(text, mask) -> Encoded                  lm.embed(text) -> [B,L,D]               lm.read(x, mask) -> hidden [B,T,D]
    lm.logits(hidden) -> [B,T,V]               lm.join(prefix, text, mask) -> x, mask  lm.generate(x, mask, max_new=, how=) -> ids [B,N]
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.cache import Cache
from polysense.nn.check import check_text
from polysense.nn.head import Linear
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.norm import LayerNorm, RMSNorm
from polysense.nn.rotary import Rotary, Turn
from polysense.nn.stepwise import Stepwise, plain
from polysense.nn.transformer import Transformer
from polysense.towers.decoding import Greedy
from polysense.towers.encoded import Encoded, Tower

WORTH = 16                                   # tokens to be written that are worth a copy of the weights


class LearnedPositions(Part):
    """A learned vector for each position, counted from `offset` (OPT leaves the first two rows of its table unused). Weight [offset + length, D]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        length: int
        width: int = 0                       # 0: set by the owner
        offset: int = 2

    def __init__(self, c: Config):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(c.offset + c.length, c.width) * 0.02), c.offset

    def forward(self, position: Tensor) -> Tensor:
        """position [T] or [B,T] -> [...,T,D]."""
        return nn.functional.embedding(position + self.offset, self.weight)


class CausalLM(Tower):
    """A decoder-only transformer: token embeddings (+ learned positions), causal blocks, final norm, a head over the vocabulary.

    `llama(...)` and `opt(...)` below give the Configs of the two published families. Every real token counts its position from the first
    real one and sees only real ones, so a padded batch gives what each text gives alone, wherever the padding stands.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int                          # the most tokens it reads, prefix included
        body: Transformer.Config
        position: Spec | None = None         # LearnedPositions.Config; None: the blocks turn queries and keys (Rotary)
        head: Spec | None = None             # Linear.Config [D -> V]; None: the transposed embedding (tied)

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = build(c.position, width=c.width) if c.position is not None else None
        self.body = c.body.build()
        self.head = c.head.build() if c.head is not None else None
        self.length, self.width, self.vocab = c.length, c.width, c.vocab
        ropes = [b.attn.rope for b in self.body.blocks]
        alike = ropes[0] is not None and len({(r.turned, r.base) if r is not None else None for r in ropes}) == 1
        self.rotary = ropes[:1] if alike else []                     # in a list: a part of the body, not another one of this module
        self._steps: tuple[Any, Stepwise] | None = None              # state of the weights, and their copies for one token at a time
        self.first = 0                                     # the position of the first token; behind a prefix of keys it is the prefix's length
        self.soft: Any = None                                     # learned tokens among the real ones (mechanisms.prefix)

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Encoded:
        """text [B,L] ids, mask [B,L] (None: all are real) -> tokens [B,L,D] (normed), pooled [B,D] (the last real token), mask.

        Raises UserError for ids outside the vocabulary and for more than `length` tokens.
        """
        check_text(text, self.length, self.vocab)
        hidden = self.read(self.embed(text), mask)
        return Encoded(tokens=hidden, pooled=last_real(hidden, mask), mask=mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] of `read` -> [...,V]."""
        return nn.functional.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)

    def read(self, x: Tensor, mask: Tensor | None = None, source: Tensor | None = None, source_mask: Tensor | None = None) -> Tensor:
        """Embeddings x [B,T,D], mask [B,T] -> hidden [B,T,D], normed. `source` [B,S,.] and `source_mask` [B,S] or [B,T,S] go to blocks with
        cross-attention. Raises UserError for more than `length` tokens."""
        if self.soft is not None:
            x, mask, back = self.soft.among(x, mask)
            return back(self.real(x, mask, source, source_mask))
        return self.real(x, mask, source, source_mask)

    def real(self, x: Tensor, mask: Tensor | None, source: Tensor | None, source_mask: Tensor | None) -> Tensor:
        """`read` of tokens that are all given."""
        self._fits(x.shape[1])
        seen, position = (None, torch.arange(x.shape[1], device=x.device)) if mask is None else (visible(mask), places(mask))
        return self._through(x, position, seen, None, source, source_mask)

    def join(self, prefix: Tensor, text: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Soft prompts [B,P,D] in front of text [B,L], mask [B,L] -> x [B,P+L,D], mask [B,P+L] or None."""
        check_text(text, self.length, self.vocab)
        x = torch.cat([prefix, self.embed(text).to(prefix.dtype)], 1)
        return x, None if mask is None else torch.cat([mask.new_ones(prefix.shape[:2]), mask], 1)

    @torch.no_grad()
    def generate(self, x: Tensor, mask: Tensor | None = None, *, max_new: int, end: int | None, pad: int = 0, how: Spec | None = None,
                 source: Tensor | None = None, source_mask: Tensor | None = None) -> Tensor:
        """Continues embeddings x [B,T,D] (mask [B,T]): the prompt is read once into a static cache, then one token a step.

        how: Greedy.Config (None), Nucleus.Config or Beam.Config of `towers.decoding` -> new ids [B,N], N <= max_new, up to and with `end`,
        then `pad`. source [B,S,.] and source_mask [B,T,S] as in `read`: new tokens see what the last of the prompt sees. Raises UserError
        where prompt and max_new exceed `length`.
        """
        if max_new < 1:
            raise UserError(f"max_new={max_new}", "ask for at least one token")
        logits, writer = self.start(x, mask, room=max_new - 1, source=source, source_mask=source_mask)
        if not bool(logits.isfinite().all()):
            raise UserError("the language model returned numbers that are not finite", "the weights or the picture are damaged")
        return (how or Greedy.Config()).build()(logits, writer, max_new=max_new, end=end, pad=pad)

    def start(self, x: Tensor, mask: Tensor | None = None, *, room: int, source: Tensor | None = None,
              source_mask: Tensor | None = None) -> "tuple[Tensor, CachedWriter]":
        """Reads a prompt of embeddings x [B,T,D] -> logits [B,V] of the token after it, and the writer of up to `room` more."""
        if self.soft is not None:
            x, mask, _ = self.soft.among(x, mask)
        b, t = x.shape[:2]
        self._fits(t + room)
        cache = self.body.cache(b, t + room)
        if mask is None or bool(mask.all()):                                           # without padding the fast paths need no mask
            hidden, length, keys = self._through(x, torch.arange(t, device=x.device), None, cache, source, source_mask)[:, -1], None, None
        else:
            hidden = last_real(self._through(x, places(mask), visible(mask), cache, source, source_mask), mask)
            length, keys = mask.sum(1), torch.cat([mask, mask.new_ones(b, room)], 1)
        on = source_mask if source_mask is None or source_mask.ndim < 3 else last_real(source_mask, mask)[:, None]
        return self.logits(hidden), CachedWriter(self, cache, length, keys, source, on, self.stepwise() if room >= WORTH else None)

    def stepwise(self) -> Stepwise | None:
        """The blocks laid out for one token at a time, made anew when the weights have changed; None where they are not plain."""
        known = not any(b.attn.rope is not None for b in self.body.blocks if isinstance(b, PreNorm)) or bool(self.rotary)
        if not known or torch.is_autocast_enabled("cpu") or not plain(self.body):
            self._steps = None
            return None
        state = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.body.parameters())
        if self._steps is None or self._steps[0] != state:
            self._steps = state, Stepwise(self.body)
        return self._steps[1]

    def _fits(self, tokens: int) -> None:
        if tokens + self.first > self.length:
            raise UserError(f"{tokens} tokens with the prompt", f"this language model reads at most {self.length}: shorten the prompt or max_new")

    def _through(self, x: Tensor, position: Tensor, seen: Tensor | None, cache: Cache | None, source: Tensor | None = None,
                 source_mask: Tensor | None = None) -> Tensor:
        position = position + self.first
        if torch.is_grad_enabled():
            self._steps = None               # the weights may change next, and fused optimisers do not count that as a new version
        if self.position is not None:
            x = x + self.position(position).to(x.dtype)
        return self.body(x, source, mask=seen, source_mask=source_mask, causal=seen is None, cache=cache, position=self.turned(position))

    def turned(self, position: Tensor) -> Any:
        """The angles of positions, computed once for all blocks where their rotary embeddings are alike; else the positions."""
        return self.rotary[0].turn(position) if self.rotary else position


class CachedWriter:
    """A `decoding.Writer` over a key-value cache; `length` [B] real tokens and `keys` [B,T+room] real places of padded prompts, else None.
    `source` and `source_mask` [B,S] or [B,1,S]: what blocks with cross-attention look at. `steps`: the same
    blocks laid out for one token."""

    def __init__(self, lm: CausalLM, cache: Cache, length: Tensor | None, keys: Tensor | None, source: Tensor | None = None,
                 source_mask: Tensor | None = None, steps: Stepwise | None = None):
        self.lm, self.cache, self.length, self.keys, self.source, self.source_mask = lm, cache, length, keys, source, source_mask
        self.steps = steps

    def __call__(self, token: Tensor) -> Tensor:
        """token [B] -> logits [B,V] of the next."""
        at = self.cache.length
        x = self.lm.embed(token[:, None])
        if self.length is None or self.keys is None:
            position, seen = torch.arange(at, at + 1, device=x.device), None
        else:
            position, seen = self.length[:, None], self.keys[:, None, :at + 1]
            self.length = self.length + 1
        position = position + self.lm.first
        if self.lm.position is not None:
            x = x + self.lm.position(position).to(x.dtype)
        if self.steps is not None:
            turn = self.lm.turned(position)
            return self.lm.logits(self.steps(x[:, 0], self.cache, turn if isinstance(turn, Turn) else None, seen))
        return self.lm.logits(self.lm.body(x, self.source, mask=seen, source_mask=self.source_mask, cache=self.cache,
                                           position=self.lm.turned(position))[:, -1])

    def pick(self, rows: Tensor) -> None:
        self.cache.pick(rows)
        if self.length is not None and self.keys is not None:
            self.length, self.keys = self.length[rows], self.keys[rows]
        self.source, self.source_mask = (t if t is None else t[rows] for t in (self.source, self.source_mask))


def places(mask: Tensor) -> Tensor:
    """mask [B,T] -> positions [B,T]: real tokens are counted from 0, padding gets any."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def visible(mask: Tensor) -> Tensor:
    """mask [B,T] -> [B,T,T], True where a query sees a key: a real one, not later; padding sees itself, so that no row is empty."""
    t = mask.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=mask.device).tril()
    return (mask[:, None].bool() & causal) | torch.eye(t, dtype=torch.bool, device=mask.device)


def last_real(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """hidden [B,T,D], mask [B,T] -> [B,D], of the last real token."""
    if mask is None:
        return hidden[:, -1]
    at = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def llama(*, vocab: int, length: int, width: int, depth: int, heads: int, hidden: int, kv_heads: int | None = None, base: float = 10000.0,
          eps: float = 1e-6) -> CausalLM.Config:
    """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, no biases, grouped queries from kv_heads on, an untied head."""
    norm, attn = RMSNorm.Config(eps=eps), Attention.Config(bias="", rope=Rotary.Config(base=base), kv_heads=kv_heads)
    block = PreNorm.Config(attn=attn, mlp=GatedMLP.Config(hidden=hidden), norm=norm)
    return CausalLM.Config(vocab=vocab, length=length, head=Linear.Config(into=width, out=vocab, std=0.02),
                           body=Transformer.Config(width=width, depth=depth, heads=heads, block=block, norm=norm))


def opt(*, vocab: int, length: int, width: int, depth: int, heads: int, hidden: int = 0) -> CausalLM.Config:
    """OPT (Zhang et al. 2022): learned positions with an offset of 2, LayerNorm, ReLU, biases everywhere, a tied head."""
    block = PreNorm.Config(attn=Attention.Config(), mlp=MLP.Config(hidden=hidden or 4 * width, act="relu"), norm=LayerNorm.Config())
    return CausalLM.Config(vocab=vocab, length=length, position=LearnedPositions.Config(length=length, offset=2),
                           body=Transformer.Config(width=width, depth=depth, heads=heads, block=block))
