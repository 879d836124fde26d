"""A stack of blocks: the body of every transformer tower. Shapes: B batch, T tokens, S source tokens, D width."""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.cache import Cache, make_cache
from polysense.nn.init import NormalInit
from polysense.nn.norm import LayerNorm


class Transformer(Part):
    """`blocks` and a final `norm`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        depth: int
        heads: int
        block: Spec | tuple[Spec, ...] = field(default_factory=PreNorm.Config)    # PreNorm or PostNorm; a tuple has one for each depth
        norm: Spec | None = field(default_factory=LayerNorm.Config)               # after the last block; None for post-norm
        drop_path: float = 0.0                                                    # of the last block; grows linearly from 0 at the first
        init: Spec = field(default_factory=NormalInit.Config)

    def __init__(self, c: Config):
        super().__init__()
        kinds = c.block if isinstance(c.block, tuple) else (c.block,) * c.depth
        if len(kinds) != c.depth:
            raise UserError(f"{len(kinds)} blocks for a depth of {c.depth}", "give one block for all, or one for each")
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks: Any = nn.ModuleList(build(b, width=c.width, heads=c.heads, drop_path=r) for b, r in zip(kinds, rates, strict=True))
        self.norm = build(c.norm, width=c.width) if c.norm is not None else nn.Identity()
        c.init.build()(self)

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
                causal: bool = False, cache: Cache | None = None, position: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D], normed. See Attention.forward for masks, cache and position.

        at [B]: one token of each sample is wanted, [B,1,D], the same numbers for less: the last block computes only what that token needs
        (about 10/12 of a block are saved). mask is then [B,T] or None.
        """
        if at is not None:
            return self._at(x, at, mask, causal)
        return self.norm(self.layers(x, source, mask=mask, source_mask=source_mask, causal=causal, cache=cache, position=position)[-1])

    def _at(self, x: Tensor, at: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        rows, last = torch.arange(len(x), device=x.device), self.blocks[-1]
        if last.attn.rope is not None or last.cross is not None:
            return self(x, mask=mask, causal=causal)[rows, at][:, None]
        x = self.layers(x, mask=mask, causal=causal, stop=-1)[-1]
        if causal:
            seen = torch.arange(x.shape[1], device=x.device) <= at[:, None]
            mask = seen if mask is None else seen & mask
        return self.norm(last(x, mask=mask, query=x[rows, at][:, None]))

    def layers(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
               causal: bool = False, cache: Cache | None = None, position: Tensor | None = None, start: int = 0,
               stop: int | None = None) -> list[Tensor]:
        """x and the tokens after each of blocks[start:stop], before the final norm: a list one longer than the blocks run, each [B,T,D]."""
        out = [x]
        for i, block in list(enumerate(self.blocks))[start:stop]:
            out.append(block(out[-1], source, mask=mask, source_mask=source_mask, causal=causal,
                             cache=cache.layers[i] if cache is not None else None, position=position))
        return out

    def cache(self, batch: int, length: int) -> Cache:
        """Empty key-value buffers for `batch` sequences of up to `length` tokens, in the type and on the device of the weights."""
        first = self.blocks[0].attn.k.weight
        return make_cache([(b.attn.kv_heads, b.attn.head_width) for b in self.blocks], batch, length, first.dtype, first.device)


class UpperBlocks(Transformer):
    """The last blocks of a deeper one into which cross-attention was put: they begin as these, their cross-attention is their own (Li et al. 2021,
    ALBEF, section 3.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Transformer.Config):
        pass

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        numbers = [int(k.split(".")[1]) for k in weights if k.startswith("blocks.")]
        first = max(0, 1 + max(numbers, default=0) - len(self.blocks))
        added = {"cross", "norm_cross"}
        known = any(added & set(k.split(".")) for k in weights)
        out = {} if known else {k: v for k, v in self.state_dict().items() if added & set(k.split("."))}
        for name, value in weights.items():
            head, _, rest = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
            if not head or int(head) >= first:
                out[f"blocks.{int(head) - first}.{rest}" if head else name] = value
        return out
