"""The one attention of the house. Shapes: B batch, T tokens, S source tokens (keys), D width, N heads, H head width."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.cache import LayerCache

SHORT = 256                                  # tokens


def lowered(x: Tensor) -> Tensor:
    """x in the autocast type, if autocast is on: for an input that several linears read, which would each cast it again."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if device != "meta" and torch.is_autocast_enabled(device) else x


def attention_mask(mask: Tensor) -> Tensor:
    """A mask in the shape that scaled_dot_product_attention takes.

    [B,S] says which keys may be seen by all, [B,T,S] (or [1,T,S]) which key by which query, [B,N,T,S] is passed on. Boolean: True may be
    seen; floating point: added to the scores.
    """
    if mask.ndim == 2:
        return mask[:, None, None]
    return mask[:, None] if mask.ndim == 3 else mask


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[1,1,T,S], True where a key is not later than the query; the last query stands at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(H)) v: q [B,N,T,H], k and v [B,M,S,H] with M dividing N; mask [B,N,T,S] or broadcastable -> [B,N,T,H].

    Everywhere torch's fused kernel, but for two cases on processors, which take the plain products: bfloat16, whose fused backward takes three to
    five times as long on short sequences (measured at T=22 to 197); and a mask that learns, for which torch has no fused kernel there.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and not dropout and q.shape[1] == k.shape[1]:
        learns = mask is not None and mask.requires_grad
        if learns or (q.requires_grad and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= SHORT ** 2):
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            if causal:
                earlier = causal_mask(q.shape[2], k.shape[2], q.device)
                mask = earlier if mask is None else mask.masked_fill(~earlier, -torch.inf) if learns else mask & earlier
            if mask is not None:
                scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask.to(scores.dtype))
            return scores.softmax(-1).to(v.dtype) @ v
    mask = mask.to(q.dtype) if mask is not None and mask.dtype != torch.bool else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])


class Attention(Part):
    """softmax(q k^T / sqrt(H)) v, then a linear: self-attention, or cross-attention when a source is given (Vaswani et al. 2017, equation 1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner, as heads
        heads: int = 0
        source: int | None = None            # width of the keys' tokens in cross-attention; None: width
        kv_heads: int | None = None          # fewer heads for keys and values (grouped queries); None: heads
        head_width: int | None = None        # None: width / heads
        out_width: int | None = None         # of the result; None: width
        bias: str = "q k v out"              # the linears that have one
        rope: Spec | None = None             # rotary position embedding
        norm_qk: Spec | None = None          # norm of queries and keys over the head width
        dropout: float = 0.0                 # of the attention weights

    def __init__(self, c: Config):
        super().__init__()
        if not c.heads or (not c.head_width and c.width % c.heads):
            raise UserError(f"a width of {c.width} does not divide into {c.heads} heads", "choose a width that is a multiple of heads")
        self.heads, self.kv_heads = c.heads, c.kv_heads or c.heads
        if self.heads % self.kv_heads:
            raise UserError(f"{c.heads} heads do not share {c.kv_heads} key heads evenly", "choose kv_heads that divides heads")
        self.head_width, self.dropout = c.head_width or c.width // c.heads, c.dropout
        inner, kv, source, biased = self.heads * self.head_width, self.kv_heads * self.head_width, c.source or c.width, c.bias.split()
        self.q = nn.Linear(c.width, inner, bias="q" in biased)
        self.k = nn.Linear(source, kv, bias="k" in biased)
        self.v = nn.Linear(source, kv, bias="v" in biased)
        self.out = nn.Linear(inner, c.out_width or c.width, bias="out" in biased)
        self.rope = build(c.rope, width=self.head_width) if c.rope else None
        self.norm_q = build(c.norm_qk, width=self.head_width) if c.norm_qk else None
        self.norm_k = build(c.norm_qk, width=self.head_width) if c.norm_qk else None

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False,
                cache: LayerCache | None = None, position: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """x [B,T,D], source [B,S,source] or None (self) -> [B,T,D]. value [B,S,source]: what the values are read from, where that differs
        from what the keys are (DETR and SAM add positions to queries and keys alone).

        mask: see `attention_mask`. causal: no query sees a later key (alone, it takes the fast path without a mask). cache: keys and values
        of earlier tokens, which x continues. position: [T] or [B,T] for the rotary embedding; None counts on from the cache.
        """
        x = lowered(x)
        seen = x if source is None else lowered(source)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read = seen if value is None else lowered(value)
        k, v = (f(s).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for f, s in ((self.k, seen), (self.v, read)))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if self.rope is not None:
            start = cache.length if cache is not None else 0
            position = torch.arange(start, start + x.shape[1], device=x.device) if position is None else position
            q, k = self.rope(q, position), self.rope(k, position)
        if cache is not None:
            k, v = cache.extend(k, v)
        k, v, mask = self.more(k, v, mask, causal)
        mask = attention_mask(mask) if mask is not None else None
        if causal and (mask is not None or k.shape[2] != q.shape[2]):
            earlier = causal_mask(q.shape[2], k.shape[2], q.device)
            if mask is None:
                mask = None if q.shape[2] == 1 else earlier
            else:
                mask = mask & earlier if mask.dtype == torch.bool else mask.masked_fill(~earlier, -torch.inf)
            causal = False
        return self.out(self.joined(self.mix(q, k, v, mask, causal).transpose(1, 2).flatten(2)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q [B,N,T,H], k and v [B,M,S,H] -> [B,N,T,H]. `maps.mixing` puts another function in its place for a while."""
        return attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)

    def more(self, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hook: keys and values [B,M,S,H] with what stands beside the source's own, and the mask that goes with them."""
        return k, v, mask

    def joined(self, x: Tensor) -> Tensor:
        """Hook: what all heads say, side by side [B,T,N H], on its way into the output linear."""
        return x

    def values(self, x: Tensor) -> Tensor:
        """x [B,T,D] -> [B,T,D], each token's own value through the output linear, without mixing (MaskCLIP, Zhou et al. 2022, section 3.2)."""
        v = self.v(lowered(x)).unflatten(-1, (self.kv_heads, -1))
        return self.out(self.joined(v.repeat_interleave(self.heads // self.kv_heads, -2).flatten(-2)))

    def weights(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """x [B,T,D], source [B,S,source] -> softmax(q k^T / sqrt(H)) [B,N,T,S], to be looked at (Grad-CAM, roll-out); no rotary positions."""
        seen = x if source is None else source
        q, k = (f(y).unflatten(-1, (n, -1)).transpose(1, 2) for f, y, n in ((self.q, x, self.heads), (self.k, seen, self.kv_heads)))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        scores = q @ k.repeat_interleave(self.heads // self.kv_heads, 1).mT * self.head_width ** -0.5
        if mask is not None:
            mask = attention_mask(mask)
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)

    def mixed(self, weights: Tensor, source: Tensor) -> Tensor:
        """What forward makes of given weights [B,N,T,S] and the tokens they read [B,S,source] -> [B,T,D]."""
        v = self.v(source).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, 1)
        return self.out(self.joined((weights @ v).transpose(1, 2).flatten(2)))


class BiasAttention(Attention):
    """Attention with one learned key and value behind those of the source, the same for every sample (`add_bias_kv` of torch): a place to look at
    when nothing else fits."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        pass

    def __init__(self, c: Config):
        super().__init__(c)
        self.bias_k, self.bias_v = (nn.Parameter(torch.randn(self.kv_heads * self.head_width) * self.head_width ** -0.5) for _ in range(2))

    def more(self, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        if causal:
            raise UserError("attention with a learned key has no order, so it cannot be causal", "take Attention")
        k, v = (torch.cat([t, b.to(t.dtype).view(1, self.kv_heads, 1, -1).expand(len(t), -1, -1, -1)], 2)
                for t, b in ((k, self.bias_k), (v, self.bias_v)))
        return k, v, mask if mask is None else F.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else 0.0)
