"""Linear recurrences h_t = a_t h_{t-1} + b_t over all tokens at once. Shapes: B batch, L tokens, ... any further axes.

Two stretches of a recurrence compose, (a, b) then (a', b') is (a a', a' b + b'), so prefixes are found by doubling: after k rounds every token
knows the stretch of 2^k tokens that ends at it. That is done inside chunks of a fixed length, then over the ends of the chunks, so the work grows
linearly with the number of tokens, and no loop goes over tokens or chunks. All factors are products of the a_t: nothing is divided.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16


def doubled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a, b [B,L,...] -> for every token the product of the a up to it, and h without a state before; log2(L) rounds over axis 1."""
    shift, length = 1, a.shape[1]
    while shift < length:
        b = torch.cat([b[:, :shift], b[:, shift:] + a[:, shift:] * b[:, :-shift]], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return a, b


def scan(a: Tensor, b: Tensor, state: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """h_t = a_t h_{t-1} + b_t: a, b [B,L,...] and the state before the first token [B,...] (None: zero) -> h [B,L,...]."""
    length = a.shape[1]
    if length > chunk:
        more = -length % chunk
        if more:                             # behind the last token nothing happens
            ends = [0, 0] * (a.ndim - 2) + [0, more]
            a, b = F.pad(a, ends, value=1.0), F.pad(b, ends)
        a, b = (x.unflatten(1, (-1, chunk)).flatten(0, 1) for x in (a, b))
    a, b = doubled(a, b)
    if length > chunk:
        a, b = (x.unflatten(0, (-1, -(-length // chunk))) for x in (a, b))
        last = scan(a[:, :, -1], b[:, :, -1], state, chunk)                           # the state behind each chunk
        first = torch.zeros_like(last[:, :1]) if state is None else state[:, None]
        before = torch.cat([first, last[:, :-1]], 1)
        return (b + a * before[:, :, None]).flatten(1, 2)[:, :length]
    return b if state is None else b + a * state[:, None]
