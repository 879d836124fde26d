"""Visual tokens enter a language model through gates that are shut at birth. Shapes: B batch, T tokens, S visual tokens, D width."""
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.cache import LayerCache
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm


class GatedCrossAttention(Part):
    """y + tanh(a) attn(norm(y); x), then + tanh(b) mlp(norm(y)) (Alayrac et al. 2022, figure 4). Names: `norm1 attn gate1 norm2 mlp gate2`.

    The gates a and b start at zero: at birth this is the identity, bit for bit. A token that may see nothing gets nothing from the attention.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner, as heads
        heads: int = 0
        source: int = 0                      # width of the visual tokens
        attn: Spec = field(default_factory=lambda: Attention.Config(bias=""))
        mlp: Spec = field(default_factory=lambda: MLP.Config(act="squared_relu", bias=""))
        norm: Spec = field(default_factory=LayerNorm.Config)
        gates: int = 1                       # numbers in each gate: one for all features, or `width`
        birth: float = 0.0                   # value of both gates at birth, before tanh

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = build(c.norm, width=c.width), build(c.norm, width=c.width)
        self.attn = build(c.attn, width=c.width, heads=c.heads, source=c.source or c.width)
        self.mlp = build(c.mlp, width=c.width)
        self.gate1, self.gate2 = (nn.Parameter(torch.full((c.gates,), c.birth)) for _ in range(2))

    def forward(self, y: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """y [B,T,D], source [B,S,source], mask bool [B,T,S] (True: may be seen; None: all) -> [B,T,D]."""
        sees = None
        if mask is not None:
            sees = mask.any(-1, keepdim=True)
            mask = mask | ~sees                                         # no row is empty: what it mixes is thrown away below
        mixed = self.attn(self.norm1(y), source, mask=mask)
        y = y + self.gate1.tanh() * (mixed if sees is None else mixed.masked_fill(~sees, 0.0))
        return y + self.gate2.tanh() * self.mlp(self.norm2(y))


class GatedBlock(PreNorm):
    """A language model's block with a GatedCrossAttention before it, at `look`; the names of the block itself stay. Without a source it is the
    plain block."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PreNorm.Config):
        look: Spec = field(default_factory=GatedCrossAttention.Config)

    def __init__(self, c: Config):
        super().__init__(c)
        self.look = build(c.look, width=c.width, heads=c.heads)

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
                causal: bool = False, cache: LayerCache | None = None, position: Tensor | None = None, query: Tensor | None = None) -> Tensor:
        """As PreNorm.forward; source [B,S,.] are the visual tokens, source_mask [B,T,S] says which token sees which."""
        x = x if source is None else self.look(x, source, source_mask)
        return super().forward(x, mask=mask, causal=causal, cache=cache, position=position, query=query)
