"""ViT. Shapes: B batch, N patches, T tokens (prefix + N), D width, h w patch grid."""
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.nn.build import build
from polysense.nn.masking import take
from polysense.nn.patch import Patches
from polysense.nn.position import fit_positions, sincos_2d
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower

POOLS, DENSES, PLACES = ("cls", "cls4", "mean", "all", "none"), ("tokens", "values"), ("learned", "sincos", "none")
LAST = 4                                     # blocks that "cls4" reads

Fill = tuple[Tensor, Tensor]                 # mask [B,N], True is hidden, and the token [1,1,D] that stands there instead


class ViT(Tower):
    """Vision Transformer (Dosovitskiy et al. 2021): z0 = [cls; x_p E] + position, blocks, norm (equations 1 to 4).

    Another size than `image_size` is read with interpolated positions. CLIP's tower is the same with `norm_pre` and a patch embedding
    without bias.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        image_size: int
        patch: int
        body: Transformer.Config
        channels: int = 3
        prefix: int = 1                      # learned tokens in front: the class token, then distillation tokens or registers
        pool: str = "cls"                    # pooled = "cls": the first token; "mean": of the patches; "all": of all tokens (FLIP);
                                             # "none": all tokens, for a head that pools; "cls4": the first tokens of the last four blocks, each
                                             # behind the final norm, side by side: [B,4D] for a head (DINO's linear protocol)
        patch_bias: str = "patch"            # "patch": the patch embedding has a bias; "": it has not (CLIP)
        norm_pre: Spec | None = None         # before the blocks (CLIP)
        stem: Spec | None = None             # a convolutional tower (ResNet.Config) whose last map is patched (hybrid)
        dense: str = "tokens"                # local features are "tokens" of the last norm or "values" of the last attention (CLIP, as MaskCLIP)
        std: float | None = 0.02             # of class token and positions at birth; None: width ** -0.5 (CLIP)
        position: str = "learned"            # or "sincos": a fixed two-dimensional table, a buffer (MAE, MoCo v3); "none": the blocks know (BEiT)

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        if c.pool not in POOLS or c.dense not in DENSES or c.position not in PLACES or (c.pool.startswith("cls") and not c.prefix):
            raise UserError(f"pool={c.pool!r}, dense={c.dense!r}, position={c.position!r}, prefix={c.prefix} do not go together",
                            f"pool is one of {POOLS}, dense of {DENSES}, position of {PLACES}, and 'cls' and 'cls4' need a prefix")
        if c.pool == "cls4" and c.body.depth < LAST:
            raise UserError(f"pool='cls4' reads {LAST} blocks, this tower has {c.body.depth}", "take pool=cls")
        self.stem = c.stem.build() if c.stem is not None else None
        stride, channels = (1, c.channels) if c.stem is None else (c.stem.stride, c.stem.width)  # type: ignore[attr-defined]
        if c.image_size % (c.patch * stride):
            raise UserError(f"image_size={c.image_size} does not divide into patches of {c.patch * stride}", "choose a multiple")
        self.stride = stride                 # of the stem
        side = c.image_size // (c.patch * stride)
        self.grid = (side, side)
        width, std = c.width, c.width ** -0.5 if c.std is None else c.std
        self.patch = Patches(channels, width, c.patch, bias="patch" in c.patch_bias)
        self.cls = nn.Parameter(torch.randn(1, c.prefix, width) * std) if c.prefix else None
        self.position: Tensor | None = None
        if c.position == "learned":
            self.position = nn.Parameter(torch.randn(1, c.prefix + self.grid[0] * self.grid[1], width) * std)
        elif c.position == "sincos":
            del self.position
            self.register_buffer("position", sincos_2d(width, self.grid, c.prefix))
        self.norm_pre = build(c.norm_pre, width=width) if c.norm_pre is not None else None
        self.body = c.body.build()
        self.prefix, self.pool, self.dense_from, self.width = c.prefix, c.pool, c.dense, width

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """Positions trained for another (square) grid, interpolated to this one; those of fewer prefix tokens, and the tokens themselves, with
        what is new here between them and the patches (DeiT's distillation token)."""
        if value.ndim != 3 or name not in ("cls", "position"):
            return value
        had = value.shape[1] - (isqrt(value.shape[1]) ** 2 if name == "position" else 0)
        own = getattr(self, name)
        if 0 < had < self.prefix and own is not None:
            value = torch.cat([value[:, :had], own[:, had:self.prefix].detach(), value[:, had:]], 1)
        return fit_positions(value, self.prefix, self.grid) if name == "position" else value

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a Start's weights become here: a final norm that is not here is left behind (fine-tuning puts its own behind the pooling)."""
        mine = self.state_dict()
        return {k: v for k, v in weights.items() if not (k.startswith("body.norm.") and k not in mine)}

    def positions(self, position: Tensor, grid: tuple[int, int]) -> Tensor:
        """position [1,T,D] as learned -> for another grid of patches."""
        return fit_positions(position, self.prefix, grid, self.grid)

    def grid_of(self, image: Tensor) -> tuple[int, int]:
        """image [B,C,H,W] -> the patch grid (h, w)."""
        if image.ndim != 4:
            raise UserError(f"an image tensor of shape {list(image.shape)}", "this tower reads float [B,C,H,W]")
        side = self.patch.kernel_size[0] * self.stride
        return image.shape[-2] // side, image.shape[-1] // side

    def embed(self, image: Tensor, keep: Tensor | None = None, fill: Fill | None = None) -> tuple[Tensor, tuple[int, int]]:
        """image [B,C,H,W], keep [B,K] numbers of the patches that stay -> tokens before the blocks [B,T,D] and the patch grid (h, w).

        fill (mask [B,N], token [1,1,D]): the token stands in for the embedding of every patch where mask is True.
        """
        x = self.patch(image if self.stem is None else self.stem.features(image)[-1])
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if fill is not None:
            x = torch.where(fill[0][..., None], fill[1].to(x.dtype), x)
        position = None if self.position is None else self.positions(self.position, grid)
        if position is not None:
            x = x + position[:, self.prefix:]
        if keep is not None:
            x = take(x, keep)
        if self.cls is not None:
            first = self.cls if position is None else self.cls + position[:, :self.prefix]
            x = torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], 1)
        return (x if self.norm_pre is None else self.norm_pre(x)), grid

    def forward(self, image: Tensor, keep: Tensor | None = None, short: bool = False, fill: Fill | None = None) -> Encoded:
        """image [B,C,H,W] -> tokens [B,T,D] (normed) and pooled [B,D]. keep [B,K]: only these patches are read (FLIP, MAE). fill: see `embed`.

        short: only `pooled` is wanted; where that is the class token, the last block computes nothing else and tokens are [B,1,D].
        Raises UserError for a wrong number of channels or a size that the patch does not divide.
        """
        x, grid = self.embed(image, keep, fill)
        place = self.place(x, grid, keep)
        if self.pool == "cls4":
            last = self._behind(x, place, LAST)
            return Encoded(tokens=last[-1], pooled=torch.cat([y[:, 0] for y in last], 1))
        at = torch.zeros(len(x), dtype=torch.long, device=x.device) if short and self.pool == "cls" and place is None else None
        x = self.body(x, at=at, position=place)
        return Encoded(tokens=x, pooled=self._pool(x))

    def place(self, x: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Any:
        """Hook: what the blocks' attentions take as the position of the tokens x [B,T,D] of a grid; None where these carry it themselves."""
        return None

    def pooled(self, image: Tensor, /) -> Tensor:
        """image [B,C,H,W] -> `self(image).pooled` [B,D], the same numbers for less."""
        return self(image, short=True).pooled

    def features(self, image: Tensor) -> list[Tensor]:
        """image [B,C,H,W] -> the tokens [B,T,D] after each block, before the final norm."""
        x, grid = self.embed(image)
        return self.body.layers(x, position=self.place(x, grid))[1:]

    def last(self, image: Tensor, count: int) -> list[Tensor]:
        """image [B,C,H,W] -> the tokens [B,T,D] after each of the last `count` blocks, each behind the final norm (Caron et al. 2021, DINO)."""
        x, grid = self.embed(image)
        return self._behind(x, self.place(x, grid), count)

    def _behind(self, x: Tensor, place: Any, count: int) -> list[Tensor]:
        return [self.body.norm(y) for y in self.body.layers(x, position=place)[-count:]]

    def attention(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] -> [B,heads,h,w]: how the first token of the last block attends to the patches; with the prefix it sums to one.

        Where it looks outlines objects in self-supervised towers (Caron et al. 2021, DINO, figure 1). UserError for a tower without a prefix.
        """
        if not self.prefix:
            raise UserError("this tower has no class token whose attention could be shown", "build it with prefix=1")
        x, grid = self.embed(image)
        block = self.body.blocks[-1]
        x = block.norm1(self.body.layers(x, position=self.place(x, grid), stop=-1)[-1])
        return block.attn.weights(x[:, :1], x)[:, :, 0, self.prefix:].unflatten(-1, grid)

    def dense(self, image: Tensor) -> Tensor:
        """image [B,C,H,W] -> [B,h,w,D], a feature for each patch in the space of `pooled`."""
        x, grid = self.embed(image)
        if self.dense_from == "tokens":
            return self.body(x, position=self.place(x, grid))[:, self.prefix:].unflatten(1, grid)
        x = self.body.blocks[-1].unmixed(self.body.layers(x, position=self.place(x, grid), stop=-1)[-1])
        return self.body.norm(x)[:, self.prefix:].unflatten(1, grid)

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool == "none":
            return x
        return x[:, 0] if self.pool == "cls" else x[:, 0 if self.pool == "all" else self.prefix:].mean(1)
