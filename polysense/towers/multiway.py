"""A tower for pictures, texts and pairs of both, as one transformer. Shapes: B batch, I image tokens (class token + N patches), L text tokens, D."""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.check import check_text
from polysense.nn.init import RescaledInit
from polysense.nn.multiway import MultiwayBlock, MultiwayTransformer, Route
from polysense.nn.norm import LayerNorm
from polysense.nn.patch import Patches
from polysense.nn.position import fit_positions
from polysense.nn.relative import PairBias

Fill = tuple[Tensor, Tensor]                 # mask [B,N], True is hidden, and the token [1,1,D] that stands there instead


class Seen(NamedTuple):
    """Normed tokens of a picture [B,I,D] and of a text [B,L,D]; empty for what was not given."""
    image: Tensor
    text: Tensor


class ImageEmbedding(Part):
    """[cls; patches] and, where they have any, their positions. `skip` rows of the table of positions stand before the first (BEiT-3: 2)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        size: int
        patch: int
        width: int = 0                       # 0: set by the owner
        channels: int = 3
        position: str = "none"               # or "learned"
        skip: int = 0

    def __init__(self, c: Config):
        super().__init__()
        if c.size % c.patch or c.position not in ("none", "learned"):
            raise UserError(f"size={c.size}, patch={c.patch}, position={c.position!r}", "patches divide the size; positions are 'none' or 'learned'")
        self.grid, self.skip = (c.size // c.patch, c.size // c.patch), c.skip
        self.patch = Patches(c.channels, c.width, c.patch)
        self.cls = nn.Parameter(torch.randn(1, 1, c.width) * 0.02)
        n = c.skip + 1 + self.grid[0] * self.grid[1]
        self.position = nn.Parameter(torch.randn(1, n, c.width) * 0.02) if c.position == "learned" else None

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """Positions of another square grid, interpolated to this one."""
        return fit_positions(value, self.skip + 1, self.grid) if name == "position" and value.ndim == 3 else value

    def forward(self, image: Tensor, fill: Fill | None = None) -> Tensor:
        """image [B,C,H,W] -> [B,I,D]. fill: what stands in for hidden patches, before positions are added."""
        x = self.patch(image)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if fill is not None:
            x = torch.where(fill[0][..., None], fill[1].to(x.dtype), x)
        x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], 1)
        return x if self.position is None else x + fit_positions(self.position[:, self.skip:], 1, grid, self.grid)


class TextEmbedding(Part):
    """Words, with positions or a kind (row 0 of two, BERT's) where they have one, and a norm where they have one."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int
        width: int = 0                       # 0: set by the owner
        pad: int = 0
        kinds: int = 0
        position: str = "none"               # or "learned"
        skip: int = 0
        norm: Spec | None = None

    def __init__(self, c: Config):
        super().__init__()
        if c.position not in ("none", "learned"):
            raise UserError(f"position={c.position!r} of a text", "it is 'none' or 'learned'")
        self.length, self.pad, self.skip = c.length, c.pad, c.skip
        self.embed, self.kind = nn.Embedding(c.vocab, c.width), nn.Embedding(c.kinds, c.width) if c.kinds else None
        for table in filter(None, (self.embed, self.kind)):
            nn.init.trunc_normal_(table.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(1, c.skip + c.length, c.width) * 0.02) if c.position == "learned" else None
        self.norm = build(c.norm, width=c.width) if c.norm is not None else None

    def forward(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> [B,L,D]. UserError for a text longer than `length`."""
        check_text(text, self.length, self.embed.num_embeddings)
        x = self.embed(text)
        x = x if self.position is None else x + self.position[:, self.skip:self.skip + text.shape[1]]
        x = x if self.kind is None else x + self.kind.weight[0]
        return x if self.norm is None else self.norm(x)


class Multiway(Part):
    """VLMo's, VL-BEiT's and BEiT-3's encoder: `image` and `text` embeddings, `kind` [2,D] added to them (text 0, picture 1) and a `body`.

    Which expert reads a token follows from what is given; padding is never looked at.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        image: ImageEmbedding.Config
        text: TextEmbedding.Config
        body: MultiwayTransformer.Config
        kinds: int = 0                       # 2 in VLMo; 3 where a second picture has a kind of its own

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        self.image, self.text, self.body = build(c.image, width=c.width), build(c.text, width=c.width), c.body.build()
        self.kind = nn.Embedding(c.kinds, c.width) if c.kinds else None
        if self.kind is not None:
            nn.init.trunc_normal_(self.kind.weight, std=0.02)
        self.grid, self.width = self.image.grid, c.width

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """image [B,C,H,W] -> the patch grid (h, w)."""
        if image.ndim != 4:
            raise UserError(f"an image tensor of shape {list(image.shape)}", "this tower reads float [B,C,H,W]")
        side = self.image.patch.kernel_size[0]
        return image.shape[-2] // side, image.shape[-1] // side

    def embed(self, image: Tensor | None = None, text: Tensor | None = None, fill: Fill | None = None, kind: int = 1) -> tuple[
            Tensor, Tensor | None, int]:
        """Tokens before the blocks [B,T,D], which of them may be seen [B,T] (None: all), and I."""
        see = None if image is None else self.image(image, fill)
        say = None if text is None else self.text(text)
        if see is None and say is None:
            raise UserError("neither a picture nor a text", "give one of them, or both")
        if self.kind is not None:
            see = None if see is None else see + self.kind.weight[kind]
            say = None if say is None else say + self.kind.weight[0]
        real = None if text is None else text != self.text.pad
        if see is None or say is None:
            return (say, real, 0) if see is None else (see, None, see.shape[1])      # type: ignore[return-value]
        if len(see) != len(say):
            raise UserError(f"{len(see)} pictures and {len(say)} texts", "a pair has one of each")
        assert real is not None
        return torch.cat([see, say], 1), torch.cat([real.new_ones(see.shape[:2]), real], 1), see.shape[1]

    def forward(self, image: Tensor | None = None, text: Tensor | None = None, *, fill: Fill | None = None, sees: Tensor | None = None,
                kind: int = 1) -> Seen:
        """image [B,C,H,W], text [B,L] ids, or both. fill: see ImageEmbedding. sees: bool [T,T], which key each query may see, besides padding.
        kind: row of `kind` for the picture."""
        x, mask, i = self.embed(image, text, fill, kind)
        route = Route(i, x.shape[1] - i, image is not None and text is not None)
        return Seen(*route.cut(self.body(x, route, together(mask, sees))))

    def branches(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One modality, read twice: normed tokens [B,T,D] by its own experts all the way, and by the experts for pairs from their first block on
        (VLMo, released code). Blocks below are run once."""
        x, mask, i = self.embed(image, text)
        route, first = Route(i, x.shape[1] - i, False), self.body.first_fused
        below = self.body.layers(x, route, mask, stop=first)[-1]
        own, fused = (self.body.layers(below, route._replace(fused=f), mask, start=first)[-1] for f in (False, True))
        return self.body.normed(own, route), self.body.normed(fused, route)

    def pooled(self, given: Tensor, /) -> Tensor:
        """A picture [B,C,H,W] or a text [B,L] -> its first token, normed [B,D]."""
        return self(image=given).image[:, 0] if given.is_floating_point() else self(text=given).text[:, 0]

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a BEiT (`BeitTower`, one table of positions or one a layer) become attention, experts for pictures and picture embedding;
        all that a BEiT lacks stays as it is here. Weights of another Multiway are returned as they are."""
        if "patch.weight" not in weights:
            return weights
        mine, tables = dict(self.state_dict()), dict[int, Tensor]()
        for name, value in weights.items():
            if name.endswith("relative.table"):
                tables[int(name.split(".")[2]) if ".blocks." in name else -1] = value
                continue
            name = name if name.startswith("body.") else f"image.{name}"
            mine[name.replace(".norm2.", ".image.norm.").replace(".mlp.", ".image.mlp.")] = value
        bias = self.body.relative
        if tables and bias is not None:
            own = torch.cat([tables[i] if i in tables else tables[-1] for i in range(bias.deep)], 1)
            mine["body.relative.table"] = bias.adapt("table", torch.cat([own, bias.table[bias.own:]]))
        return mine


def together(mask: Tensor | None, sees: Tensor | None) -> Tensor | None:
    """Which tokens are real [B,T] and which may see which [T,T] -> a mask for attention."""
    if sees is None:
        return mask
    return sees[None] if mask is None else mask[:, None] & sees


def prefix_sees(image: int, text: int, device: torch.device | str | None = None) -> Tensor:
    """bool [T,T]: a picture sees itself, each word the picture and the words up to itself (Dong et al. 2019, UniLM; BEiT-3's captions)."""
    out = torch.ones(image + text, image + text, dtype=torch.bool, device=device).tril()
    out[:image, :image] = True
    return out


def apart_sees(image: int, text: int, device: torch.device | str | None = None) -> Tensor:
    """bool [T,T]: a picture and a text that do not see each other."""
    side = torch.arange(image + text, device=device) < image
    return side[:, None] == side


def shared_multiway(size: int, patch: int, width: int, depth: int, heads: int, fused: int, vocab: int, length: int, scale: float = 0.1,
                    reach: int = 196, drop_path: float = 0.0) -> Multiway.Config:
    """VLMo's and VL-BEiT's: relative positions, scaled branches, keys without bias. `fused`: so many blocks, the last ones, have VL-FFN."""
    norm, side = LayerNorm.Config(eps=1e-6), size // patch
    return Multiway.Config(
        image=ImageEmbedding.Config(size=size, patch=patch), kinds=2,
        text=TextEmbedding.Config(vocab=vocab, length=length, kinds=2, norm=LayerNorm.Config(eps=1e-12)),
        body=MultiwayTransformer.Config(
            width=width, depth=depth, heads=heads, norm=norm, fused=fused, drop_path=drop_path, init=RescaledInit.Config(),
            relative=PairBias.Config(grid=(side, side), reach=reach),
            block=MultiwayBlock.Config(attn=Attention.Config(bias="q v out"), norm=norm, layer_scale=scale)))
