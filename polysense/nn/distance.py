"""Attention as T5 has it: scores that are not scaled, and a learned number for each head and distance. Shapes: T queries, S keys, N heads."""
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention


class UnscaledAttention(Attention):
    """softmax(q k^T) v, without the division by sqrt(H): T5 puts that factor into the weights it is born with (Raffel et al. 2020)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        pass

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return super().mix(q * self.head_width ** 0.5, k, v, mask, causal)


def bucket(ahead: Tensor, buckets: int, furthest: int, ways: str) -> Tensor:
    """ahead = place of the key - place of the query -> number of its bucket, of the same shape (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the others ever wider ranges up to `furthest`, from where on all are one. "both" ways: half of
    all buckets are for keys ahead of the query; "back": keys ahead share the bucket of distance 0 (a decoder never sees them).
    """
    first = torch.zeros_like(ahead)
    if ways == "both":
        buckets //= 2
        first, away = (ahead > 0).long() * buckets, ahead.abs()
    else:
        away = (-ahead).clamp(min=0)
    exact = buckets // 2
    wide = exact + (torch.log(away.clamp(min=1).float() / exact) / log(furthest / exact) * (buckets - exact)).long()
    return first + torch.where(away < exact, away, wide.clamp(max=buckets - 1))


class DistanceBias(Part):
    """`table` [buckets, N]; `bias(T, S)` is added to the scores of every layer of a body."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        heads: int
        buckets: int = 32
        furthest: int = 128
        ways: str                            # "both" or "back", see `bucket`
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        each = c.buckets // (4 if c.ways == "both" else 2)
        if c.ways not in ("both", "back") or each < 1 or c.furthest <= each:
            raise UserError(f"{c.buckets} buckets up to a distance of {c.furthest}, ways={c.ways!r}", 'take 32, 128 and "both" or "back"')
        self.table = nn.Parameter(torch.randn(c.buckets, c.heads) * c.std)
        self.buckets, self.furthest, self.ways = c.buckets, c.furthest, c.ways

    def forward(self, queries: int, keys: int) -> Tensor:
        """Numbers of tokens T and S -> [1,N,T,S]; the last query stands at the last key."""
        key = torch.arange(keys, device=self.table.device)
        ahead = key - key[keys - queries:, None]
        return self.table[bucket(ahead, self.buckets, self.furthest, self.ways)].permute(2, 0, 1)[None]
