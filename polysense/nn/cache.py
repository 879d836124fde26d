"""Keys and values of the tokens that a causal transformer has read: generation then costs one token a step."""
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polysense.base.errors import UserError


@dataclass
class LayerCache:
    """One attention's buffers [B,N,room,H], filled up to `length`."""
    k: Tensor
    v: Tensor
    length: int = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B,N,T,H] behind what is there and returns views of all that is now there."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise UserError(f"{end} tokens do not fit a cache of {self.k.shape[2]}", "make the cache longer or generate less")
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


@dataclass
class Cache:
    """Static buffers for every block of a Transformer; made by `Transformer.cache(batch, length)`. Not differentiable: use it under no_grad."""
    layers: list[LayerCache] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def pick(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders the batch: rows [B'] of the present one (beam search)."""
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        for layer in self.layers:
            layer.length = min(length, layer.length)


def make_cache(shapes: list[tuple[int, int]], batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """Empty buffers; shapes are (key heads, head width) of each layer."""
    def room(n: int, h: int) -> Tensor:
        return torch.empty(batch, n, length, h, dtype=dtype, device=device)
    return Cache([LayerCache(room(n, h), room(n, h)) for n, h in shapes])
