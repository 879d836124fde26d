"""Transformer blocks for the slot `Transformer.Config.block`. Shapes: B batch, T tokens, S source tokens, D width."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.cache import LayerCache
from polysense.nn.drop import drop_path, residual
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Spec):
    """What both kinds of block are made of. width, heads and drop_path are set by the Transformer."""
    width: int = 0
    heads: int = 0
    attn: Spec = field(default_factory=Attention.Config)
    mlp: Spec = field(default_factory=MLP.Config)
    norm: Spec = field(default_factory=LayerNorm.Config)
    cross: Spec | None = None                # an Attention.Config: cross-attention between the two halves; `source` is the width it reads
    layer_scale: float | None = None         # start of the learned factor on each branch (Touvron et al. 2021, CaiT); None: no factor
    dropout: float = 0.0                     # of each branch's output
    drop_path: float = 0.0                   # 0: set by the Transformer, growing with depth


class _Block(Part):
    def __init__(self, c: BlockConfig):
        super().__init__()
        self.norm1, self.attn = build(c.norm, width=c.width), build(c.attn, width=c.width, heads=c.heads)
        if c.cross is not None:
            self.norm_cross, self.cross = build(c.norm, width=c.width), build(c.cross, width=c.width, heads=c.heads)
        else:
            self.norm_cross = self.cross = None
        self.norm2, self.mlp = build(c.norm, width=c.width), build(c.mlp, width=c.width)
        self.scale1 = self.scale2 = None
        if c.layer_scale is not None:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((c.width,), c.layer_scale)) for _ in range(2))
        self.dropout, self.drop_path = c.dropout, c.drop_path

    def _noisy(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        y = y if scale is None else y * scale
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def _branch(self, y: Tensor, scale: Tensor | None = None) -> Tensor:
        return drop_path(self._noisy(y, scale), self.drop_path, self.training)


class PreNorm(_Block):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); the final norm belongs to the Transformer (GPT-2, ViT, CLIP)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        pass

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
                causal: bool = False, cache: LayerCache | None = None, position: Tensor | None = None, query: Tensor | None = None) -> Tensor:
        """x [B,T,D], source [B,S,.] -> [B,T,D]; the arguments are Attention's, `source_mask` is cross-attention's. No source, no cross-attention.

        query [B,Q,D], tokens of x: only they are computed, [B,Q,D]; they see all of x that mask leaves (no `causal`, no rotary positions).
        """
        if query is not None:
            x = query + self._branch(self.attn(self.norm1(query), self.norm1(x), mask=mask), self.scale1)
        else:
            def attend(x: Tensor, mask: Tensor | None) -> Tensor:
                return self._noisy(self.attn(self.norm1(x), mask=mask, causal=causal, cache=cache, position=position), self.scale1)

            # positions may belong to samples, and a cache does: then nobody is left out
            x = residual(x, attend, self.drop_path, self.training, mask) if position is None and cache is None else x + drop_path(
                attend(x, mask), self.drop_path, self.training)
        if self.cross is not None and self.norm_cross is not None and source is not None:
            x = x + self._branch(self.cross(self.norm_cross(x), source, mask=source_mask))
        return residual(x, lambda x: self._noisy(self.mlp(self.norm2(x)), self.scale2), self.drop_path, self.training)

    def unmixed(self, x: Tensor) -> Tensor:
        """x [B,T,D] -> [B,T,D]: the attention's value path alone, no mixing, no residual, no MLP: local features (MaskCLIP, Zhou et al. 2022)."""
        return self.attn.values(self.norm1(x))


class PostNorm(_Block):
    """norm1(x + attn(x)), then norm2(x + mlp(x)), no final norm (Vaswani et al. 2017, BERT)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        pass

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
                causal: bool = False, cache: LayerCache | None = None, position: Tensor | None = None, query: Tensor | None = None) -> Tensor:
        """As PreNorm.forward."""
        if query is not None:
            x = self.norm1(query + self._branch(self.attn(query, x, mask=mask), self.scale1))
        else:
            x = self.norm1(x + self._branch(self.attn(x, mask=mask, causal=causal, cache=cache, position=position), self.scale1))
        if self.cross is not None and self.norm_cross is not None and source is not None:
            x = self.norm_cross(x + self._branch(self.cross(x, source, mask=source_mask)))
        return self.norm2(x + self._branch(self.mlp(x), self.scale2))
