"""Attention patterns over a stream of text tokens followed by a grid of image tokens (DALL-E). Shapes: L text tokens, side x side image tokens."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.nn.attention import Attention
from polysense.nn.cache import LayerCache

KINDS = ("full", "row", "column", "conv")


def pattern(kind: str, text: int, side: int, kernel: int = 11) -> Tensor:
    """[T,T] bool, T = text + side^2: True where the query (row) may see the key. Text is causal, every image token sees all of the text.

    Image tokens see of the image, never what is later: "full" everything; "row" themselves and the `side` tokens before, across the border of
    rows; "column" their own column; "conv" a window of kernel x kernel around them (Ramesh et al. 2021, appendix B.1, figure 11).
    """
    if kind not in KINDS or kernel % 2 == 0:
        raise UserError(f"no attention pattern {kind!r} with a kernel of {kernel}", f"it is one of {', '.join(KINDS)}, the kernel odd")
    place = torch.arange(side * side)
    back = place[:, None] - place
    row, column = place // side, place % side
    down, across = row[:, None] - row, column[:, None] - column
    seen = {"full": back >= 0, "row": back <= side, "column": across == 0, "conv": (down <= kernel // 2) & (across.abs() <= kernel // 2)}[kind]
    out = torch.ones(text + side * side, text + side * side, dtype=torch.bool).tril()
    out[text:, text:] &= seen
    return out


class SparseAttention(Attention):
    """Self-attention under one of the patterns; with a cache, the new tokens are the next ones of the stream."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        kind: str = "row"
        text: int = 256
        side: int = 32
        kernel: int = 11                     # of "conv"

    allowed: Tensor

    def __init__(self, c: Config):
        super().__init__(c)
        self.register_buffer("allowed", pattern(c.kind, c.text, c.side, c.kernel), persistent=False)

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False,
                cache: LayerCache | None = None, position: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """As Attention.forward over the tokens of a stream from its beginning, or behind those in the cache; the pattern is the mask."""
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if end > len(self.allowed):
            raise UserError(f"a stream of {end} tokens", f"this attention has a pattern for {len(self.allowed)}")
        return super().forward(x, source, mask=self.allowed[None, start:end, :end], cache=cache, position=position, value=value)


def patterns(depth: int, text: int, side: int, kernel: int = 11) -> tuple[Spec, ...]:
    """The attention of each layer: column in every fourth layer (the second, sixth, ...), row in the others, conv in the last."""
    kinds = ["column" if i % 4 == 1 else "row" for i in range(depth - 1)] + ["conv"]
    return tuple(SparseAttention.Config(kind=kind, text=text, side=side, kernel=kernel) for kind in kinds)
