"""Relative position bias of image transformers: a learned number for each head and offset. Shapes: T tokens (prefix 1 + h w), N heads."""
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.cache import Cache, LayerCache
from polysense.nn.transformer import Transformer

EXTRA = 3                                    # class token to patch, patch to class token, class token to itself


def offsets(grid: tuple[int, int]) -> Tensor:
    """[T,T]: the row of the table for each (query, key) of a class token and the patches of a grid (Bao et al. 2022, released code)."""
    h, w = grid
    row, column = (v.flatten() for v in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    rows = (2 * h - 1) * (2 * w - 1)
    out = torch.empty(1 + h * w, 1 + h * w, dtype=torch.long)
    out[1:, 1:] = (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1
    out[0, :], out[:, 0], out[0, 0] = rows, rows + 1, rows + 2
    return out


def along(table: Tensor, queries: int, keys: int) -> Tensor:
    """Rows of a table of relative positions [2S-1,H] for every query and key of one axis: [queries,keys,H], row 0 the largest negative offset.

    Where one of the two is coarser, its places are as many of the finer apart as fit between them (Li et al. 2022, MViTv2, section 4.1, released
    code). A table for another side is interpolated linearly.
    """
    side = max(queries, keys)
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    one, two = side / queries, side / keys
    query, key = torch.arange(queries, device=table.device) * one, torch.arange(keys, device=table.device) * two
    return table[(query[:, None] - key + (keys - 1) * two).long()]


def resized(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table [(2h-1)(2w-1)+3, N] for another grid: offsets interpolated in two dimensions, the three extra rows as they are."""
    if old == new:
        return table
    field_ = table[:-EXTRA].unflatten(0, (2 * old[0] - 1, 2 * old[1] - 1)).permute(2, 0, 1)[None]
    field_ = F.interpolate(field_.float(), (2 * new[0] - 1, 2 * new[1] - 1), mode="bilinear", align_corners=False)
    return torch.cat([field_[0].flatten(1).T.to(table.dtype), table[-EXTRA:]])


class RelativeBias(Part):
    """`table` [(2h-1)(2w-1)+3, N], zero at birth; `bias(tokens)` is added to the attention scores (BEiT; Shaw et al. 2018)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        grid: tuple[int, int]
        heads: int = 0                       # 0: set by the owner

    index: Tensor

    def __init__(self, c: Config):
        super().__init__()
        h, w = self.grid = c.grid
        self.table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + EXTRA, c.heads))
        self.register_buffer("index", offsets(c.grid), persistent=False)

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """A table of another (square) grid, interpolated to this one."""
        side = (round((len(value) - EXTRA) ** 0.5) + 1) // 2
        return resized(value, (side, side), self.grid) if name == "table" and value.ndim == 2 else value

    def forward(self, tokens: int) -> Tensor:
        """tokens T -> [1,N,T,T]. Of another number than the grid has, they are a square grid, and the table is interpolated."""
        index, table = self.index, self.table
        if tokens != len(index):
            side = round((tokens - 1) ** 0.5)
            if side * side != tokens - 1:
                raise UserError(f"{tokens} tokens are no class token and a square of patches", "relative positions need all patches, in a square")
            index, table = offsets((side, side)).to(table.device), resized(table, self.grid, (side, side))
        return table[index].permute(2, 0, 1)[None]


@cache
def pair_offsets(grid: tuple[int, int], text: int, reach: int) -> Tensor:
    """[I+L,I+L]: the row of a PairBias' table for each (query, key) of a class token, the patches of a grid, and a text of L tokens."""
    image, across = offsets(grid), (2 * grid[0] - 1) * (2 * grid[1] - 1) + EXTRA
    own, last = len(image), across + 2 + 2 * reach
    out = torch.empty(own + text, own + text, dtype=torch.long)
    out[:own, :own], out[own:, :own], out[:own, own:] = image, across, across + 1
    place = torch.arange(text)
    said = place - place[:, None] + reach - 2 + across + 2               # how much further on the key stands
    if text:
        said[0, :], said[:, 0], said[0, 0] = last - 3, last - 2, last - 1
    out[own:, own:] = said
    return out


class PairBias(Part):
    """Relative positions of pictures, of texts, and one number each for a text that looks at a picture and a picture that looks at a text (Bao et
    al. 2022, VLMo, released code).

    `table` [R, layers N], zero at birth, holds those of all layers side by side. Its rows: the picture's as in `RelativeBias`; text to picture;
    picture to text; 2 `reach` of texts, offsets from -(reach-2) to reach-2, then first token to word, word to first token, first to itself.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        grid: tuple[int, int]
        reach: int = 196                     # texts have at most so many tokens
        heads: int = 0                       # 0: set by the owner, as layers
        layers: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.grid, self.reach, self.deep = c.grid, c.reach, c.layers
        self.own = (2 * c.grid[0] - 1) * (2 * c.grid[1] - 1) + EXTRA
        self.table = nn.Parameter(torch.zeros(self.own + 2 + 2 * c.reach, c.heads * c.layers))

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """A table of another (square) grid, interpolated to this one; texts as they are."""
        if name != "table" or value.ndim != 2:
            return value
        own = len(value) - 2 - 2 * self.reach
        side = (round(max(0, own - EXTRA) ** 0.5) + 1) // 2
        if (2 * side - 1) ** 2 != own - EXTRA:
            return value
        return torch.cat([resized(value[:own], (side, side), self.grid), value[own:]])

    def forward(self, image: int, text: int) -> list[Tensor]:
        """So many tokens of a picture and of a text (0: none) -> for each layer [1,N,T,T]. Pictures of another number of tokens than the grid has
        are square, and their offsets are interpolated. UserError for a longer text."""
        if text > self.reach:
            raise UserError(f"a text of {text} tokens", f"relative positions reach {self.reach}")
        grid, table = self.grid, self.table
        if image and image != 1 + grid[0] * grid[1]:
            side = round((image - 1) ** 0.5)
            if side * side != image - 1:
                raise UserError(f"{image} tokens are no class token and a square of patches", "relative positions need all patches, in a square")
            grid, table = (side, side), torch.cat([resized(table[:self.own], grid, (side, side)), table[self.own:]])
        index = pair_offsets(grid, text, self.reach).to(table.device)
        start = 0 if image else len(index) - text
        index = index[start:, start:]
        return [b[None] for b in table[index].permute(2, 0, 1).chunk(self.deep)]


class BiasedAttention(Attention):
    """Self-attention with a relative position bias of its own: what fine-tuning gives every layer."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        relative: RelativeBias.Config = field(default_factory=lambda: RelativeBias.Config(grid=(14, 14)))

    def __init__(self, c: Config):
        super().__init__(c)
        self.relative = build(c.relative, heads=c.heads)

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False,
                cache: LayerCache | None = None, position: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """As Attention.forward over all tokens of a picture; mask: floating point or None."""
        bias = self.relative(x.shape[1])
        return super().forward(x, source, mask=bias if mask is None else bias + mask, causal=causal, cache=cache, position=position,
                               value=value)


class BiasedTransformer(Transformer):
    """A body all of whose layers share one relative position bias: what BEiT's pre-training has."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Transformer.Config):
        relative: RelativeBias.Config = field(default_factory=lambda: RelativeBias.Config(grid=(14, 14)))

    def __init__(self, c: Config):
        super().__init__(c)
        self.relative = build(c.relative, heads=c.heads)

    def layers(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
               causal: bool = False, cache: Cache | None = None, position: Tensor | None = None, start: int = 0,
               stop: int | None = None) -> list[Tensor]:
        """As Transformer.layers, with the bias on the scores of every one; mask: floating point or None."""
        bias = self.relative(x.shape[1])
        return super().layers(x, source, mask=bias if mask is None else bias + mask, source_mask=source_mask, causal=causal, cache=cache,
                              position=position, start=start, stop=stop)

    def _at(self, x: Tensor, at: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return self(x, mask=mask, causal=causal)[torch.arange(len(x), device=x.device), at][:, None]
