"""Looking at attention, and putting a hand into it, from outside. Shapes: B batch, N heads, T queries, S keys, H head width."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from polysense.nn.attention import Attention, attend, attention_mask, causal_mask

Mix = Callable[[str, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def softmax_map(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(H)): q [B,N,T,H], k [B,N,S,H] -> [B,N,T,S], rows sum to 1. mask: as `attend` takes it."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if mask is not None:
        mask = attention_mask(mask)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


@contextmanager
def mixing(module: nn.Module, mix: Mix, which: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """Within it, every Attention of `module` whose name `which` accepts mixes by `mix(name, q, k, v, mask) -> [B,N,T,H]`: a place for methods
    that read or change maps, keys or values (prompt-to-prompt, shared attention). A causal attention hands its mask in."""
    def called(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return mix(name, q, k, v, causal_mask(q.shape[2], k.shape[2], q.device) if causal else mask)

    chosen = [(n, m) for n, m in module.named_modules() if isinstance(m, Attention) and which(n)]
    for name, m in chosen:
        m.mix = partial(called, name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for _, m in chosen:
            del m.mix


@contextmanager
def recorded(module: nn.Module, which: Callable[[str], bool] = lambda name: True) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, maps [B,N,T,S] are kept: name of the Attention -> one for each of its calls. Results stay as they are."""
    seen: dict[str, list[Tensor]] = {}

    def mix(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.setdefault(name, []).append(softmax_map(q, k, mask))
        return attend(q, k, v, mask)

    with mixing(module, mix, which):
        yield seen
