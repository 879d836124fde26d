"""Norms inside the branches of a block: what lets large towers (EVA, BEiT-3) train in half precision (Wang et al. 2022, Foundation Transformers)."""
from dataclasses import dataclass, field

from torch import Tensor

from polysense.base.spec import Spec
from polysense.nn.attention import Attention, lowered
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.cache import LayerCache
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.norm import LayerNorm


class SubNormAttention(Attention):
    """out(norm_inner(heads)): a norm over all heads before the output linear."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        norm_inner: Spec = field(default_factory=LayerNorm.Config)

    def __init__(self, c: Config):
        super().__init__(c)
        self.norm_inner = build(c.norm_inner, width=self.heads * self.head_width)

    def joined(self, x: Tensor) -> Tensor:
        return self.norm_inner(x)


class SubNormMLP(MLP):
    """down(norm_inner(act(up(x)))) (BEiT-3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MLP.Config):
        norm_inner: Spec = field(default_factory=LayerNorm.Config)

    def __init__(self, c: Config):
        super().__init__(c)
        self.norm_inner = build(c.norm_inner, width=self.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm_inner(self.act(self.up(x))))


class SubNormGatedMLP(GatedMLP):
    """down(norm_inner(act(gate(x)) * up(x)))."""

    @dataclass(frozen=True, kw_only=True)
    class Config(GatedMLP.Config):
        norm_inner: Spec = field(default_factory=LayerNorm.Config)

    def __init__(self, c: Config):
        super().__init__(c)
        self.norm_inner = build(c.norm_inner, width=self.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        x = lowered(x)
        return self.down(self.norm_inner(self.act(self.gate(x)) * self.up(x)))


class BranchNorm(PreNorm):
    """x + norm1(attn(x)), then x + norm2(mlp(x)): the norms stand behind the branches, inside the residual (Liu et al. 2022, Swin v2; EVA-02-E)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PreNorm.Config):
        pass

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
                causal: bool = False, cache: LayerCache | None = None, position: Tensor | None = None, query: Tensor | None = None) -> Tensor:
        """As PreNorm.forward, without cross-attention."""
        first = x if query is None else query
        heard = self.attn(first, None if query is None else x, mask=mask, causal=causal, cache=cache, position=position)
        x = first + self._branch(self.norm1(heard), self.scale1)
        return x + self._branch(self.norm2(self.mlp(x)), self.scale2)

    def unmixed(self, x: Tensor) -> Tensor:
        """x [B,T,D] -> [B,T,D], the value path alone: see PreNorm."""
        return self.norm1(self.attn.values(x))
