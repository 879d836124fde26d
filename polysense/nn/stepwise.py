"""A causal transformer read one token at a time, with its weights laid out for that. Shapes: B batch, N heads, M key heads, H head width, D width.

At one token a step the products are small: what counts is how fast weights are read and how many calls stand between the products. So queries,
keys and values become one product, gate and up another, and the weights lie in memory as a product with few rows reads them. The numbers
are those of `Transformer.forward`, the key-value cache is the one that the prompt was read into.
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.cache import Cache, LayerCache
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.norm import RMSNorm
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


def laid(*linears: nn.Linear, after: nn.Module | None = None) -> Laid:
    """after: the norm that they read behind; the weight of an RMSNorm is multiplied into theirs (see `Unit`)."""
    bias = [n.weight.new_zeros(len(n.weight)) if n.bias is None else n.bias for n in linears]
    weight = torch.cat([n.weight for n in linears]).T
    weight = weight * after.weight[:, None] if isinstance(after, RMSNorm) else weight
    return Laid(weight.contiguous(), None if all(n.bias is None for n in linears) else torch.cat(bias))


class Unit:
    """An RMSNorm without its weight: x [B,D] -> x / sqrt(mean(x^2) + eps), in four calls."""

    def __init__(self, norm: RMSNorm):
        self.eps, self.share = norm.weight.new_full((1, 1), norm.eps), 1 / len(norm.weight)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x * torch.addcmul(self.eps, length, length, value=self.share).rsqrt_()


class Step:
    """One PreNorm block."""

    def __init__(self, block: PreNorm):
        attn, mlp = block.attn, block.mlp
        self.norm1, self.norm2 = (Unit(n) if isinstance(n, RMSNorm) else n for n in (block.norm1, block.norm2))
        self.act = mlp.act
        self.heads, self.kv_heads, self.width, self.rope = attn.heads, attn.kv_heads, attn.head_width, attn.rope is not None
        self.qkv, self.out, self.down = laid(attn.q, attn.k, attn.v, after=block.norm1), laid(attn.out), laid(mlp.down)
        inward = (mlp.gate, mlp.up) if isinstance(mlp, GatedMLP) else (mlp.up,)
        self.up, self.gated = laid(*inward, after=block.norm2), len(inward) == 2
        for part in (self.qkv.weight.T, self.qkv.bias):                      # queries come scaled, as turning them does not change their length
            if part is not None:
                part[:self.heads * self.width] *= self.width ** -0.5

    def __call__(self, x: Tensor, cache: LayerCache, turn: tuple[Tensor, Tensor] | None, seen: Tensor | None) -> Tensor:
        """x [B,D] -> [B,D]; turn: cosines and signed sines [B or 1,1,H]; seen [B or 1,1,S]: which tokens of the cache are real."""
        heads = self.qkv(self.norm1(x)).unflatten(1, (-1, self.width))
        qk, v = heads[:, :self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads:]
        if turn is not None:
            qk = torch.addcmul(qk * turn[0], qk.roll(self.width // 2, -1), turn[1])
        k, v = cache.extend(qk[:, self.heads:, None], v[:, :, None])
        # One query a head: two plain products cost less than the fused kernel, which is made for many.
        scores = torch.bmm(qk[:, :self.heads].reshape(len(x) * self.kv_heads, -1, self.width), k.flatten(0, 1).mT)
        if seen is not None:
            scores = scores.view(len(x), self.heads, -1).masked_fill_(~seen, -torch.inf).view(scores.shape)
        x = x + self.out(torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(len(x), -1))
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
