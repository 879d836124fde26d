"""A causal transformer read one token at a time, with its weights laid out for that. Shapes: B batch, N heads, M key heads, H head width, D width.

At one token a step the products are small: what counts is how fast weights are read and how many calls stand between the products. So queries,
keys and values become one product, gate and up another, and the weights lie in memory as a product with few rows reads them. The numbers
are those of `Transformer.forward`, the key-value cache is the one that the prompt was read into.
"""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.cache import Cache, LayerCache
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.rotary import Rotary, Turn
from polysense.nn.transformer import Transformer

MOST = 2 ** 30                               # bytes of weights that are worth a second copy: of more, reading them is all that counts


@dataclass(frozen=True)
class Laid:
    """Linears that read the same input, as one: weight [D,out], bias [out] or None."""
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [B,D] -> [B,out]."""
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


def laid(*linears: nn.Linear) -> Laid:
    bias = [n.weight.new_zeros(len(n.weight)) if n.bias is None else n.bias for n in linears]
    return Laid(torch.cat([n.weight for n in linears]).T.contiguous(), None if all(n.bias is None for n in linears) else torch.cat(bias))


class Step:
    """One PreNorm block."""

    def __init__(self, block: PreNorm):
        attn, mlp = block.attn, block.mlp
        self.norm1, self.norm2, self.act = block.norm1, block.norm2, mlp.act
        self.heads, self.kv_heads, self.width, self.rope = attn.heads, attn.kv_heads, attn.head_width, attn.rope is not None
        self.qkv, self.out, self.down = laid(attn.q, attn.k, attn.v), laid(attn.out), laid(mlp.down)
        self.up, self.gated = (laid(mlp.gate, mlp.up), True) if isinstance(mlp, GatedMLP) else (laid(mlp.up), False)

    def __call__(self, x: Tensor, cache: LayerCache, turn: tuple[Tensor, Tensor] | None, seen: Tensor | None) -> Tensor:
        """x [B,D] -> [B,D]; turn: cosines and signed sines [B or 1,1,H]; seen [B,1,1,S]: which tokens of the cache are real."""
        heads = self.qkv(self.norm1(x)).unflatten(1, (-1, self.width))
        qk, v = heads[:, :self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads:]
        if turn is not None:
            qk = torch.addcmul(qk * turn[0], qk.roll(self.width // 2, -1), turn[1])
        k, v = cache.extend(qk[:, self.heads:, None], v[:, :, None])
        y = F.scaled_dot_product_attention(qk[:, :self.heads, None], k, v, attn_mask=seen, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.flatten(1))
        h = self.up(self.norm2(x))
        if self.gated:
            gate, h = h.chunk(2, 1)
            return x + self.down(self.act(gate) * h)
        return x + self.down(self.act(h))


class Stepwise:
    """The blocks of a Transformer that `plain` accepts, with copies of their weights: stale once these change."""

    def __init__(self, body: Transformer):
        self.body, self.steps = body, [Step(b) for b in body.blocks]

    def __call__(self, x: Tensor, cache: Cache, turn: Turn | None, seen: Tensor | None) -> Tensor:
        """The next token x [B,D] of each sequence -> [B,D], normed. turn: the angles of their positions where the blocks are rotary;
        seen [B,1,S]: which tokens of the cache, this one included, are real; None: all."""
        by = None
        if turn is not None:
            by = torch.cat([turn.cos, turn.cos], -1).view(-1, 1, 2 * turn.cos.shape[-1]), torch.cat([-turn.sin, turn.sin], -1).view(
                -1, 1, 2 * turn.sin.shape[-1])
        seen = None if seen is None else seen[:, None]
        for step, layer in zip(self.steps, cache.layers, strict=True):
            x = step(x, layer, by, seen)
        return self.body.norm(x)


def plain(body: Transformer) -> bool:
    """Whether `Stepwise` computes what the body would: parts of exactly the known kinds, without hooks, in float32 on a processor, in eval
    mode, of at most `MOST` bytes."""
    known = {PreNorm, Attention, Rotary, MLP, GatedMLP, nn.Linear, nn.ModuleList, Transformer}
    inner = [m for b in body.blocks for m in b.modules()]
    norms = {id(m) for b in body.blocks for n in (getattr(b, "norm1", None), getattr(b, "norm2", None)) if n is not None for m in n.modules()}
    params: list[Any] = list(body.parameters())
    return (not body.training and all(type(b) is PreNorm and b.cross is None and b.scale1 is None and b.scale2 is None for b in body.blocks)
            and all(type(m) in known or id(m) in norms or not list(m.parameters()) for m in inner)
            and all(not (m._forward_hooks or m._forward_pre_hooks or {"mix", "more", "forward"} & set(m.__dict__)) for m in [body, *inner])
            and all(b.attn.norm_q is None and (b.attn.rope is None or b.attn.rope.turned == b.attn.head_width) for b in body.blocks)
            and all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.device.type == "cpu" for p in params)
            and sum(4 * p.numel() for p in params) <= MOST)
