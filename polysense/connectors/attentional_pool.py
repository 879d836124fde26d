"""Attentional poolers (Lee et al. 2019; Yu et al. 2022, CoCa): learned queries read the tokens of a picture. B batch, N tokens, Q queries."""
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.norm import LayerNorm
from polysense.towers.encoded import Encoded, Tower
from polysense.towers.vit import ViT

ORDERS = ("cascade", "parallel", "single")


class AttentionalPooler(Part):
    """One layer of cross-attention from Q learned queries, both sides normed: [B,N,source] -> [B,Q,D]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        heads: int = 8
        queries: int = 256
        source: int = 0                      # width of the tokens; 0: set by the owner
        norm: Spec = field(default_factory=LayerNorm.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.query = nn.Parameter(torch.randn(c.queries, c.width) * c.width ** -0.5)
        self.norm_q, self.norm_k = build(c.norm, width=c.width), build(c.norm, width=c.source)
        self.attn = Attention.Config(width=c.width, heads=c.heads, source=c.source).build()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B,N,source] -> [B,Q,D]."""
        return self.attn(self.norm_q(self.query).expand(len(tokens), -1, -1), self.norm_k(tokens))

    def values(self, tokens: Tensor) -> Tensor:
        """tokens [B,N,source] -> [B,N,D]: each token's own value, of which what is pooled is a mixture."""
        return self.attn.values(self.norm_k(tokens))


class PooledViT(Tower):
    """A ViT and its poolers: tokens [B,Q,D] that a decoder reads, and pooled [B,D] for contrast (Yu et al. 2022, section 3.2).

    order: "cascade", the contrastive pooler reads what the other one made; "parallel", both read the ViT; "single", one pooler, whose first query
    is the feature and the rest are tokens, normed (the released weights of open_clip). Names: `tower caption contrast norm`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        tower: ViT.Config
        caption: AttentionalPooler.Config
        contrast: AttentionalPooler.Config | None = None     # of one query; None: "single"
        order: str = "cascade"
        norm: Spec = field(default_factory=LayerNorm.Config)  # "single": of what is pooled

        @property
        def width(self) -> int:
            return self.caption.width

    def __init__(self, c: Config):
        super().__init__()
        if c.order not in ORDERS or (c.contrast is None) != (c.order == "single") or c.caption.queries < 1 + (c.order == "single"):
            raise UserError(f"order={c.order!r} {'with' if c.contrast else 'without'} a contrastive pooler, {c.caption.queries} queries",
                            f"the order is one of {', '.join(ORDERS)}; 'single' has one pooler of at least two queries")
        self.tower, self.caption = c.tower.build(), build(c.caption, source=c.tower.width)
        self.contrast = build(c.contrast, source=c.tower.width if c.order == "parallel" else c.caption.width) if c.contrast else None
        self.norm = build(c.norm, width=c.caption.width) if c.contrast is None else nn.Identity()
        self.order, self.width = c.order, c.width

    def forward(self, image: Tensor) -> Encoded:
        """image [B,3,H,W] -> tokens [B,Q,D] and pooled [B,D]."""
        return self.read(self.tower(image).tokens)

    def read(self, seen: Tensor) -> Encoded:
        """The ViT's tokens [B,N,W], such as are cached of a locked one -> the same."""
        tokens = self.caption(seen)
        if self.contrast is None:
            tokens = self.norm(tokens)
            return Encoded(tokens=tokens[:, 1:], pooled=tokens[:, 0])
        return Encoded(tokens=tokens, pooled=self.contrast(seen if self.order == "parallel" else tokens)[:, 0])

    def dense(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,D]: each place's own value on its way to `pooled`."""
        seen = self.tower.dense(image)
        grid, seen = seen.shape[1:3], seen.flatten(1, 2)
        if self.contrast is None:
            return self.norm(self.caption.values(seen)).unflatten(1, grid)
        return self.contrast.values(seen if self.order == "parallel" else self.caption.values(seen)).unflatten(1, grid)
