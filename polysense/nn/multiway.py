"""Transformers of several modalities: one attention over all tokens, an expert for each modality. Shapes: B batch, T tokens = I of a picture, then
L of a text; D width, N heads.

Attention knows no order, so that "[text; image]" of the papers and "[image; text]" here are one function; what is known of places is in the
embeddings or in a bias on the scores (`nn.relative.PairBias`).
"""
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import attention_mask, lowered
from polysense.nn.block import BlockConfig, PreNorm
from polysense.nn.build import build
from polysense.nn.drop import drop_path
from polysense.nn.init import NormalInit
from polysense.nn.norm import LayerNorm
from polysense.nn.relative import PairBias

EXPERTS = ("image", "text", "pair")


class Route(NamedTuple):
    """How many leading tokens are a picture's and how many are a text's; `fused`: blocks that have an expert for pairs use it for all of them."""
    image: int
    text: int
    fused: bool

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,T,D] -> its picture [B,I,D] and its text [B,L,D]."""
        return x[:, :self.image], x[:, self.image:]


def each(route: Route, x: Tensor, image: Any, text: Any) -> Tensor:
    """`image` of the picture's tokens, `text` of the text's; a modality without tokens is not asked."""
    if not route.text:
        return image(x)
    if not route.image:
        return text(x)
    see, say = route.cut(x)
    return torch.cat([image(see), text(say)], 1)


class Expert(Part):
    """A feed-forward network behind a norm of its own: mlp(norm(x))."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        norm: Spec = field(default_factory=LayerNorm.Config)
        mlp: Spec | None = None

    def __init__(self, c: Config):
        super().__init__()
        assert c.mlp is not None
        self.norm, self.mlp = build(c.norm, width=c.width), build(c.mlp, width=c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class MultiwayBlock(Part):
    """x + attn(norm1(x)) over all tokens, then x + expert(x), the expert being that of the token's modality; a block with an expert for pairs uses
    it for every token of a pair (Bao et al. 2022, VLMo, section 3.2). Attention, its norm and the factors on the branches are shared."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        experts: str = "image text"          # and "pair"

    image: Any
    text: Any
    pair: Any

    def __init__(self, c: Config):
        super().__init__()
        self.names = tuple(c.experts.split())
        if not self.names or set(self.names) - set(EXPERTS) or c.cross is not None:
            raise UserError(f"experts={c.experts!r} of a Multiway block", f"they are some of {' '.join(EXPERTS)}, and there is no cross-attention")
        self.norm1, self.attn = build(c.norm, width=c.width), build(c.attn, width=c.width, heads=c.heads)
        for name in self.names:
            setattr(self, name, Expert(Expert.Config(width=c.width, norm=c.norm, mlp=c.mlp)))
        self.scale1 = self.scale2 = None
        if c.layer_scale is not None:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((c.width,), c.layer_scale)) for _ in range(2))
        self.dropout, self.drop_path = c.dropout, c.drop_path

    def writers(self) -> list[nn.Linear]:
        """The linears that write to the residual stream."""
        return [self.attn.out, *(getattr(self, n).mlp.down for n in self.names)]

    def forward(self, x: Tensor, route: Route, mask: Tensor | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]; mask as Attention's."""
        x = x + self._branch(self.attn(self.norm1(x), mask=mask), self.scale1)
        if route.fused and "pair" in self.names:
            return x + self._branch(self.pair(x), self.scale2)
        return x + self._branch(each(route, x, *(getattr(self, n, None) for n in ("image", "text"))), self.scale2)

    def _branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        y = y if scale is None else y * scale
        y = F.dropout(y, self.dropout, self.training) if self.dropout else y
        return drop_path(y, self.drop_path, self.training)


class DecoupledBlock(Part):
    """Two blocks, one for each modality, whose attention is one: every linear and norm exists twice, and queries of either see keys of both (Wang
    et al. 2023, BEiT-3, as released). No expert for pairs."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        pass

    def __init__(self, c: Config):
        super().__init__()
        if c.layer_scale is not None or c.cross is not None:
            raise UserError("a decoupled block has neither layer scale nor cross-attention", "leave them out")
        one = PreNorm.Config(width=c.width, heads=c.heads, attn=c.attn, mlp=c.mlp, norm=c.norm)
        self.image, self.text = one.build(), one.build()
        self.dropout, self.drop_path = c.dropout, c.drop_path

    def writers(self) -> list[nn.Linear]:
        """The linears that write to the residual stream."""
        return [m for half in (self.image, self.text) for m in (half.attn.out, half.mlp.down)]

    def forward(self, x: Tensor, route: Route, mask: Tensor | None = None) -> Tensor:
        """As MultiwayBlock's."""
        x = x + self._branch(self.attend(each(route, x, self.image.norm1, self.text.norm1), route, mask))
        return x + self._branch(each(route, x, lambda y: self.image.mlp(self.image.norm2(y)), lambda y: self.text.mlp(self.text.norm2(y))))

    def attend(self, x: Tensor, route: Route, mask: Tensor | None) -> Tensor:
        """x [B,T,D], normed -> [B,T,D]: queries, keys and values by modality, one softmax over all of them."""
        x, a, b = lowered(x), self.image.attn, self.text.attn
        q, k, v = (each(route, x, getattr(a, n), getattr(b, n)).unflatten(-1, (a.heads, -1)).transpose(1, 2) for n in "qkv")
        first = a if route.image else b
        heard = first.mix(q, k, v, None if mask is None else attention_mask(mask), False).transpose(1, 2).flatten(2)
        return each(route, heard, lambda y: a.out(a.joined(y)), lambda y: b.out(b.joined(y)))

    def _branch(self, y: Tensor) -> Tensor:
        y = F.dropout(y, self.dropout, self.training) if self.dropout else y
        return drop_path(y, self.drop_path, self.training)


class MultiwayTransformer(Part):
    """`blocks`, the `norm` behind them, and `relative`, a bias on the scores of all layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        depth: int
        heads: int
        block: Spec = field(default_factory=MultiwayBlock.Config)
        norm: Spec | None = field(default_factory=LayerNorm.Config)
        norms: str = "one"                   # of the tokens of both modalities, or "two"
        fused: int = 0                       # how many blocks, the last ones, have an expert for pairs
        relative: PairBias.Config | None = None
        drop_path: float = 0.0
        init: Spec = field(default_factory=NormalInit.Config)

    def __init__(self, c: Config):
        super().__init__()
        if not 0 <= c.fused <= c.depth or (c.fused and not isinstance(c.block, MultiwayBlock.Config)) or c.norms not in ("one", "two"):
            raise UserError(f"{c.fused} of {c.depth} blocks with an expert for pairs, norms={c.norms!r}",
                            "at most all blocks have one, decoupled ones none; norms is 'one' or 'two'")
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        kinds = [c.block if i < c.depth - c.fused else c.block.but(experts="image text pair") for i in range(c.depth)]
        self.blocks: Any = nn.ModuleList(build(b, width=c.width, heads=c.heads, drop_path=r) for b, r in zip(kinds, rates, strict=True))
        self.first_fused = c.depth - c.fused
        norms = [build(c.norm, width=c.width) if c.norm is not None else nn.Identity() for _ in range(2)]
        self.norm: Any = norms[0] if c.norms == "one" else nn.ModuleDict(dict(zip(("image", "text"), norms, strict=True)))
        self.relative: PairBias | None = build(c.relative, heads=c.heads, layers=c.depth) if c.relative is not None else None
        c.init.build()(self)

    def forward(self, x: Tensor, route: Route, mask: Tensor | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D], normed. mask: bool [B,T], which tokens may be seen, or [B,T,T] or [1,T,T], which by which."""
        return self.normed(self.layers(x, route, mask)[-1], route)

    def normed(self, x: Tensor, route: Route) -> Tensor:
        """x [B,T,D] through the last norm."""
        return each(route, x, self.norm["image"], self.norm["text"]) if isinstance(self.norm, nn.ModuleDict) else self.norm(x)

    def layers(self, x: Tensor, route: Route, mask: Tensor | None = None, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """x and the tokens after each of blocks[start:stop], before the norm."""
        seen = None if mask is None else attention_mask(mask)
        bias = self.relative(route.image, route.text) if self.relative is not None else None
        out = [x]
        for i, block in list(enumerate(self.blocks))[start:stop]:
            scores = seen if bias is None else bias[i] if seen is None else bias[i].masked_fill(~seen, -torch.inf)
            out.append(block(out[-1], route, scores))
        return out
