"""Attention that makes one vector of many tokens: what attentive probes learn. Shapes: B batch, N tokens, D width."""
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer


class AttentivePool(Part):
    """One query q [1,1,D] over tokens [B,N,D]: out(softmax(q k^T / sqrt(H)) v) -> [B,D], each of q, k, v behind a norm of its own (Chen et al. 2022,
    CAE, section 4.2). No positions: the order of the tokens does not matter."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner
        heads: int = 12
        norm: Spec = field(default_factory=LayerNorm.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.query, self.heads = nn.Parameter(torch.randn(1, 1, c.width) * 0.02), c.heads
        self.norm_q, self.norm_k, self.norm_v = (build(c.norm, width=c.width) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.mixed(self.norm_q(self.query), self.norm_k(tokens), self.norm_v(tokens)))[:, 0]

    def mixed(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query [1,1,D], keys and values [B,N,D] -> [B,1,D], the heads side by side."""
        q, k, v = self.q(query).expand(len(keys), -1, -1), self.k(keys), self.v(values)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class JepaPool(AttentivePool):
    """V-JEPA's form (Bardes et al. 2024, section 4): `body`, blocks of self-attention, then x = query + attention, x + mlp(norm(x)). Keys and values
    are behind one norm, the query behind none, and no linear follows the heads."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentivePool.Config):
        depth: int = 0                       # blocks of self-attention
        mlp: Spec = field(default_factory=MLP.Config)

    def __init__(self, c: Config):
        super().__init__(c)
        del self.out, self.norm_v            # norm_q: of the MLP
        self.mlp: Any = build(c.mlp, width=c.width)
        self.body = Transformer.Config(width=c.width, depth=c.depth, heads=c.heads, norm=None, block=PreNorm.Config(norm=c.norm, mlp=c.mlp)).build()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm_k(self.body(tokens))
        x = self.query + self.mixed(self.query, tokens, tokens)
        return (x + self.mlp(self.norm_q(x)))[:, 0]


class AttentiveHead(Part):
    """An attentive pool of the tokens behind the `prefix` first, a batch norm without parameters, a dense layer: [B, prefix + N, D] -> [B,out]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        prefix: int = 1
        pool: Spec = field(default_factory=AttentivePool.Config)
        std: float = 0.01

    def __init__(self, c: Config):
        super().__init__()
        self.pool, self.norm, self.out = build(c.pool, width=c.into), nn.BatchNorm1d(c.into, affine=False), nn.Linear(c.into, c.out)
        nn.init.trunc_normal_(self.out.weight, std=c.std)
        nn.init.zeros_(self.out.bias)
        self.prefix = c.prefix

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.pool(tokens[:, self.prefix:])))
