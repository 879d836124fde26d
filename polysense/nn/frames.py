"""Blocks of a picture's transformer that also look along time. Shapes: B clips, T frames, N tokens a frame, D width."""
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.build import build
from polysense.nn.cache import LayerCache
from polysense.nn.transformer import Transformer


class FrameBlock(PreNorm):
    """y = x + position_time; y + attn_time(norm_time(y)) over the frames, every place for itself; then the block as it is over the places of
    every frame (Zhu et al. 2024, LanguageBind; Bertasius et al. 2021, TimeSformer, divided attention)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PreNorm.Config):
        frames: int = 8
        attn_time: Spec = field(default_factory=Attention.Config)

    def __init__(self, c: Config):
        super().__init__(c)
        self.frames = c.frames
        self.norm_time, self.attn_time = build(c.norm, width=c.width), build(c.attn_time, width=c.width, heads=c.heads)
        self.position_time = nn.Parameter(torch.randn(1, c.frames, c.width) * c.width ** -0.5)

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a block that knows no time: what looks along it begins as a copy of what looks over the picture, its positions as they are here."""
        if any(k.startswith("attn_time.") for k in weights):
            return weights
        twins = {k.replace("attn.", "attn_time.", 1).replace("norm1.", "norm_time.", 1): v.clone() for k, v in weights.items()
                 if k.startswith(("attn.", "norm1."))}
        return weights | twins | {"position_time": self.position_time.detach()}

    def over_time(self, x: Tensor) -> Tensor:
        """x [B T,N,D], the frames of a clip one after the other -> the same after the look along time. UserError for another number of frames."""
        if len(x) % self.frames:
            raise UserError(f"{len(x)} frames are not clips of {self.frames}", "read as many of each clip as the feed says")
        n = x.shape[1]
        y = x.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(0, 1) + self.position_time
        y = y + self._branch(self.attn_time(self.norm_time(y)))
        return y.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor, source: Tensor | None = None, *, mask: Tensor | None = None, source_mask: Tensor | None = None,
                causal: bool = False, cache: LayerCache | None = None, position: Tensor | None = None, query: Tensor | None = None) -> Tensor:
        """As PreNorm.forward, on x [B T,N,D]."""
        return super().forward(self.over_time(x), source, mask=mask, source_mask=source_mask, causal=causal, cache=cache, position=position,
                               query=None if query is None else self.over_time(query))


def over_time(of: Transformer.Config, frames: int) -> Transformer.Config:
    """CLIP's transformer with a look along `frames` frames before every block."""
    return of.but(block=FrameBlock.Config(attn=Attention.Config(), mlp=of.block.mlp, norm=of.block.norm, frames=frames))  # type: ignore[union-attr]
