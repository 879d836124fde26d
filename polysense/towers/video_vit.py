"""ViT over clips. Shapes: B batch, F frames, T tokens of the grid (t, h, w), time first, K visible ones, D width."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.nn.check import check_video
from polysense.nn.masking import take
from polysense.nn.patch import patchify
from polysense.nn.position import SeparablePositions, sincos_pairs
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower


class VideoViT(Tower):
    """Cubes of `tubelet` frames and `patch` x `patch` pixels are the tokens of one transformer: joint attention over space and time (Tong et al.
    2022, VideoMAE; Arnab et al. 2021, ViViT model 1). No class token; fixed positions, sines and cosines of the cube's number."""

    position: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        image_size: int
        frames: int
        patch: int
        body: Transformer.Config
        tubelet: int = 2
        channels: int = 3

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        if c.image_size % c.patch or c.frames % c.tubelet:
            raise UserError(f"{c.frames} frames of {c.image_size} pixels do not divide into cubes of {c.tubelet}x{c.patch}x{c.patch}",
                            "choose multiples")
        side = c.image_size // c.patch
        self.grid, self.width = (c.frames // c.tubelet, side, side), c.width
        self.frames, self.image_size = c.frames, c.image_size
        self.patch = nn.Conv3d(c.channels, c.width, (c.tubelet, c.patch, c.patch), (c.tubelet, c.patch, c.patch))
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))
        assert self.patch.bias is not None
        nn.init.zeros_(self.patch.bias)
        self.register_buffer("position", sincos_pairs(c.width, self.grid[0] * side * side)[None], persistent=False)
        self.body = c.body.build()

    def grid_of(self, video: Tensor) -> tuple[int, int, int]:
        """video [B,F,C,H,W] -> the grid of cubes (t, h, w). Raises UserError for clips of another size than this tower reads."""
        check_video(video, self.patch.in_channels, self.frames, self.image_size)
        return self.grid

    def places(self) -> Tensor:
        """Hook: the positions of all cubes [1,T,D]."""
        return self.position

    def embed(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """video [B,F,C,H,W], keep [B,K] numbers of the cubes that stay -> tokens before the blocks [B,T,D]; only these are embedded."""
        self.grid_of(video)
        cubes = patchify(video, self.patch.kernel_size[1], self.patch.kernel_size[0])
        place = self.places().expand(len(video), -1, -1)
        if keep is not None:
            cubes, place = take(cubes, keep), take(place, keep)
        weight = self.patch.weight.permute(0, 2, 3, 4, 1).flatten(1)               # the values of a cube lie in the order time, row, column, channel
        return F.linear(cubes, weight, self.patch.bias) + place

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Encoded:
        """video [B,F,C,H,W] -> tokens [B,T,D] (normed) and pooled [B,D], their mean. keep [B,K]: only these cubes are read."""
        x = self.body(self.embed(video, keep))
        return Encoded(tokens=x, pooled=x.mean(1))


class SeparableVideoViT(VideoViT):
    """The same with learned positions, those of space and of time added up, and a class token with a position of its own (Feichtenhofer et al. 2022,
    MAE-ST, section 3). `prefix=0`: no class token. Pooled is the mean of the cubes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(VideoViT.Config):
        prefix: int = 1

    def __init__(self, c: Config):
        super().__init__(c)
        del self.position
        self.prefix = c.prefix
        self.cls = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, c.prefix, c.width), std=0.02, a=-0.04, b=0.04))
        self.place = SeparablePositions.Config(width=c.width, grid=self.grid, prefix=c.prefix).build()

    def places(self) -> Tensor:
        return self.place()

    def embed(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """video [B,F,C,H,W], keep [B,K] numbers of the cubes that stay -> tokens before the blocks [B, prefix + K, D]."""
        x = super().embed(video, keep)
        return torch.cat([(self.cls + self.place.first).expand(len(x), -1, -1).to(x.dtype), x], 1)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Encoded:
        """video [B,F,C,H,W] -> tokens [B, prefix + T, D] (normed) and pooled [B,D]. keep [B,K]: only these cubes are read."""
        x = self.body(self.embed(video, keep))
        return Encoded(tokens=x, pooled=x[:, self.prefix:].mean(1))
