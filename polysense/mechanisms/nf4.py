"""NF4: weights of four bits with levels at the quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, section 3 and appendix E).

    w in a block of 64:  code = nearest level to w / absmax,  two codes in a byte;  absmax itself in 8 bits (double quantisation):
    absmax - mean(absmax) in blocks of 256, nearest of 256 levels, one fp32 maximum for each block.

The quantiles are asymmetric, eight above zero and seven below, so that zero is one of the levels. Codes, order of nibbles and levels are those of
bitsandbytes, bit for bit.
"""
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.mechanisms.adapter import chosen
from polysense.mechanisms.lora import LowRank

LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
          0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
          0.7229568362236023, 1.0)
BLOCK, SECOND = 64, 256                      # weights with one absmax, absmaxes with one second constant


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of an 8-bit number whose exponent length varies (Dettmers 2016, 8-bit approximations): seven decades from 1e-6, the i-th
    with 2^i levels of each sign at the middles of equal steps of [0.1, 1]; and 0 and 1."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1, device="cpu")
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    levels = torch.cat([*decades, *(-d for d in decades), torch.tensor([0.0, 1.0], device="cpu")])
    return levels.sort().values


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Numbers of the nearest levels (rising) -> uint8; in the middle the lower one."""
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


@dataclass
class Quantised:
    """Two codes a byte [n / 2, rounded up], and the constants: `absmax` fp32 [blocks]; or uint8 [blocks] with `second` fp32 and `mean` fp32 []."""
    codes: Tensor
    absmax: Tensor
    mean: Tensor | None
    second: Tensor | None
    shape: tuple[int, ...]

    @property
    def bits(self) -> float:
        """Stored bits for each weight, constants included."""
        n = 1
        for s in self.shape:
            n *= s
        return 8 * sum(t.numel() * t.element_size() for t in (self.codes, self.absmax, self.mean, self.second) if t is not None) / n


def blocks_of(flat: Tensor, size: int) -> Tensor:
    """[n] -> [blocks, size], the last filled with zeros."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def quantise(weight: Tensor, double: int = SECOND, levels: tuple[float, ...] = LEVELS) -> Quantised:
    """weight of any shape -> its codes and constants. double: block size of the second quantisation, 0 for none."""
    rows = blocks_of(weight.detach().float().flatten(), BLOCK)
    absmax = rows.abs().amax(1)
    table = torch.tensor(levels, device=weight.device)
    code = nearest(rows * (1 / absmax.clamp(min=1e-38))[:, None], table).flatten()[:weight.numel()]
    code = F.pad(code, (0, len(code) % 2))
    packed = (code[::2] << 4) | code[1::2]               # the first of a pair in the upper half
    if not double:
        return Quantised(packed, absmax, None, None, tuple(weight.shape))
    mean = absmax.mean()
    held = blocks_of(absmax - mean, double)
    second = held.abs().amax(1)
    small = nearest(held * (1 / second.clamp(min=1e-38))[:, None], dynamic_levels().to(weight.device)).flatten()[:len(absmax)]
    return Quantised(packed, small, mean, second, tuple(weight.shape))


def constants(q: Quantised) -> Tensor:
    """absmax of each block, fp32 [blocks]."""
    if q.second is None or q.mean is None:
        return q.absmax
    held = dynamic_levels().to(q.codes.device)[q.absmax.long()]
    return (blocks_of(held, SECOND) * q.second[:, None]).flatten()[:len(held)] + q.mean


def dequantise(q: Quantised, levels: tuple[float, ...] = LEVELS) -> Tensor:
    """fp32 weights in their shape."""
    n = torch.Size(q.shape).numel()
    code = torch.stack([q.codes >> 4, q.codes & 15], 1).flatten()[:n].long()
    value = torch.tensor(levels, device=q.codes.device)[code]
    return (blocks_of(value, BLOCK) * constants(q)[:, None]).flatten()[:n].view(q.shape)


class _Product(torch.autograd.Function):
    """x W^T with a W that exists only while it is multiplied: what is kept for the backward pass are the codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *out: Tensor) -> tuple[Tensor, None]:
        return out[0] @ ctx.layer.weight.to(out[0].dtype), None


class NF4Linear(nn.Linear):
    """A dense layer whose frozen weight is NF4: buffers `codes absmax mean second`; `weight` is computed anew at every look."""

    def take(self, value: Tensor) -> None:
        """Quantises the weight [d,k] into the buffers."""
        q = quantise(value)
        for name in ("codes", "absmax", "mean", "second"):
            self.register_buffer(name, getattr(q, name))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        q = Quantised(*(self._buffers[n] for n in ("codes", "absmax", "mean", "second")), (self.out_features, self.in_features))  # type: ignore[arg-type]
        return dequantise(q)

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # type: ignore[operator]

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a Start: its weight is quantised on the way in."""
        if "weight" in weights:
            q = quantise(weights["weight"])
            weights = {k: v for k, v in weights.items() if k != "weight"} | {n: getattr(q, n) for n in ("codes", "absmax", "mean", "second")}
        return weights


def squeeze(layer: nn.Linear) -> None:
    """A dense layer becomes an NF4Linear, in place, keeping its bias."""
    weight = layer.weight.detach()
    del layer._parameters["weight"]
    layer.__class__ = NF4Linear
    layer.take(weight)  # type: ignore[operator]
    if layer.bias is not None:
        layer.bias.requires_grad_(False)


def restore(system: nn.Module) -> None:
    """Every NF4 layer a dense one again, holding the dequantised weight: what updates can be merged into."""
    for layer in [m for m in system.modules() if isinstance(m, NF4Linear)]:
        weight = layer.weight
        for name in ("codes", "absmax", "mean", "second"):
            del layer._buffers[name]
        own = type(layer)
        if own is NF4Linear:
            layer.__class__ = nn.Linear
        else:                                            # with an update on it: the same class over a dense layer
            layer.__class__ = type(own.__name__.replace("NF4", ""), (own.__mro__[1], nn.Linear), {})
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


@dataclass(frozen=True, kw_only=True)
class QuantisedLowRank(LowRank):
    """LoRA over an NF4 base: every dense layer of every block is quantised and gets an update; norms, embeddings and heads stay as they are."""
    rank: int = 64
    alpha: float | None = 16.0
    dropout: float = 0.1
    on: str = "*.blocks.*"

    def put(self, system: nn.Module) -> None:
        if self.parts != 1:
            raise UserError(f"parts={self.parts} of quantised layers", "put plain LoRA on fused layers")
        for _, layer in chosen(system, self.on, lambda m: type(m) is nn.Linear, "dense layer"):
            squeeze(layer)  # type: ignore[arg-type]
        LowRank.put(self, system)

    def settle(self, system: nn.Module) -> None:
        """Into the dequantised weights: what the updates were learned beside."""
        restore(system)
        LowRank.settle(self, system)
