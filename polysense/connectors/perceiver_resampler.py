"""Any number of visual features become a fixed number of tokens. Shapes: B batch, T frames, S features a frame, D width, R latents."""
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm


class ResamplerLayer(Part):
    """latents + attn(latents; [features; latents]), then + mlp: both inputs normed (Alayrac et al. 2022, figure 5 and appendix A.1.1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner, as heads
        heads: int = 0
        attn: Spec = field(default_factory=lambda: Attention.Config(bias="", head_width=64))
        mlp: Spec = field(default_factory=lambda: MLP.Config(act="squared_relu", bias=""))

    def __init__(self, c: Config):
        super().__init__()
        self.norm_source, self.norm1, self.norm2 = (LayerNorm.Config(width=c.width).build() for _ in range(3))
        self.attn, self.mlp = build(c.attn, width=c.width, heads=c.heads), build(c.mlp, width=c.width)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """latents [B,R,D], features [B,S,D] -> [B,R,D]."""
        query = self.norm1(latents)
        latents = latents + self.attn(query, torch.cat([self.norm_source(features), query], 1))
        return latents + self.mlp(self.norm2(latents))


class PerceiverResampler(Part):
    """Learned latents that look at the features of a picture or a video, layer by layer: always R tokens (Alayrac et al. 2022, section 3.1.1).

    Each frame's features get that frame's learned time embedding; there are no spatial positions, so the order of features within a frame
    means nothing. More frames than trained are read with interpolated time embeddings. No weight decays (appendix B.1.2). Names: `latents time
    layers.{i} norm`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int
        depth: int = 6
        heads: int = 8
        latents: int = 64
        frames: int = 8                      # of the longest video trained on; 0: no time embedding, pictures only (Idefics)
        layer: Spec = field(default_factory=ResamplerLayer.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(c.latents, c.width))
        self.time = nn.Parameter(torch.randn(c.frames, c.width)) if c.frames else None
        self.layers: Any = nn.ModuleList(build(c.layer, width=c.width, heads=c.heads) for _ in range(c.depth))
        self.norm, self.width = LayerNorm.Config(width=c.width).build(), c.width
        self.undecayed = tuple(name for name, _ in self.named_parameters())

    def forward(self, features: Tensor) -> Tensor:
        """features [B,S,D] of pictures or [B,T,S,D] of videos -> [B,R,D]. Raises UserError for another width or for frames without embeddings."""
        x = features[:, None] if features.ndim == 3 else features
        if x.ndim != 4 or x.shape[-1] != self.width:
            raise UserError(f"features of shape {list(features.shape)}", f"this resampler reads [B,S,{self.width}] or [B,T,S,{self.width}]")
        if self.time is not None:
            x = x + self.times(x.shape[1])[:, None].to(x.dtype)
        elif x.shape[1] > 1:
            raise UserError(f"{x.shape[1]} frames", "this resampler was made for pictures: it has no time embedding")
        x = x.flatten(1, 2)
        latents = self.latents.to(x.dtype).expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        return self.norm(latents)

    def times(self, frames: int) -> Tensor:
        """The time embeddings [frames, D]: the first of the trained ones, or for more frames all of them, interpolated linearly."""
        assert self.time is not None
        if frames <= len(self.time):
            return self.time[:frames]
        return F.interpolate(self.time.T[None], frames, mode="linear", align_corners=True)[0].T
