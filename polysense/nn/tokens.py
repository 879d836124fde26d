"""Inputs of every modality into tokens, for the slot `ModalViT.Config.tokens`. Shapes: B batch, N tokens, D width.

Each Config has `.count`, how many tokens it makes, and is given `width` by its owner.
"""
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.check import check_image


def _born(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=weight[0].numel() ** -0.5)


class PlaneTokens(Part):
    """A convolution over a plane of `channels` (depth, heat, a spectrogram), its patches apart or overlapping, and a norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        size: tuple[int, int]                # pixels, height and width
        kernel: int
        stride: int
        channels: int = 1
        width: int = 0
        norm: Spec | None = None

        @property
        def grid(self) -> tuple[int, int]:
            """Patches down and across."""
            h, w = ((n - self.kernel) // self.stride + 1 for n in self.size)
            return h, w

        @property
        def count(self) -> int:
            return prod(self.grid)

    def __init__(self, c: Config):
        super().__init__()
        self.size, self.stride = c.size, c.stride
        self.weight = nn.Parameter(torch.empty(c.width, c.channels, c.kernel, c.kernel))
        _born(self.weight)
        self.norm = build(c.norm, width=c.width) if c.norm is not None else nn.Identity()

    def forward(self, plane: Tensor) -> Tensor:
        """plane [B,C,H,W] -> [B,N,D]. Raises UserError for another number of channels or size."""
        check_image(plane, self.weight.shape[1])
        if tuple(plane.shape[2:]) != self.size:
            raise UserError(f"a plane of {plane.shape[2]}x{plane.shape[3]}", f"this tower reads {self.size[0]}x{self.size[1]}")
        return self.norm(F.conv2d(plane, self.weight, stride=self.stride).flatten(2).transpose(1, 2))


class ClipTokens(Part):
    """Cubes of `frames` frames and PxP pixels; a picture is a clip that stands still. Clips of other lengths are read `frames` at a time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        size: int                            # pixels, square
        patch: int
        frames: int = 2
        channels: int = 3
        width: int = 0

        @property
        def count(self) -> int:
            return (self.size // self.patch) ** 2

    def __init__(self, c: Config):
        super().__init__()
        if c.size % c.patch:
            raise UserError(f"size={c.size} does not divide into patches of {c.patch}", "choose a multiple")
        self.size = c.size
        self.weight = nn.Parameter(torch.empty(c.width, c.channels, c.frames, c.patch, c.patch))
        _born(self.weight)

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """The weight of a picture's patches [D,C,P,P], spread evenly over the frames: a picture then gives the same tokens."""
        frames = self.weight.shape[2]
        return value[:, :, None].expand(-1, -1, frames, -1, -1) / frames if name == "weight" and value.ndim == 4 else value

    def forward(self, clip: Tensor) -> Tensor:
        """clip [B,frames,C,H,W], or a picture [B,C,H,W] that is repeated -> [B,N,D]. Raises UserError for other shapes."""
        frames, channels = self.weight.shape[2], self.weight.shape[1]
        if clip.ndim == 4:
            check_image(clip, channels)
            clip = clip[:, None].expand(-1, frames, -1, -1, -1)
        if clip.ndim != 5 or not clip.is_floating_point() or tuple(clip.shape[1:]) != (frames, channels, self.size, self.size):
            raise UserError(f"a clip of shape {list(clip.shape)} and type {clip.dtype}",
                            f"this tower reads float [B,{frames},{channels},{self.size},{self.size}]")
        p, (b, t, c, h, w) = self.weight.shape[3], clip.shape
        cubes = clip.reshape(b, t, c, h // p, p, w // p, p).permute(0, 3, 5, 2, 1, 4, 6).reshape(b, -1, c * t * p * p)
        return F.linear(cubes, self.weight.flatten(1))


class WindowTokens(Part):
    """Windows of a signal of several channels (acceleration and rotation), each through one linear, and a norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        length: int                          # samples
        channels: int = 6
        kernel: int = 8                      # samples a window, without overlap
        width: int = 0
        norm: Spec | None = None

        @property
        def count(self) -> int:
            return self.length // self.kernel

    def __init__(self, c: Config):
        super().__init__()
        self.shape, self.kernel = (c.channels, c.length), c.kernel
        self.weight = nn.Parameter(torch.empty(c.width, c.channels * c.kernel))
        _born(self.weight)
        self.norm = build(c.norm, width=c.width) if c.norm is not None else nn.Identity()

    def forward(self, signal: Tensor) -> Tensor:
        """signal [B,C,S] -> [B,N,D]. Raises UserError for other shapes."""
        if signal.ndim != 3 or not signal.is_floating_point() or tuple(signal.shape[1:]) != self.shape:
            raise UserError(f"a signal of shape {list(signal.shape)} and type {signal.dtype}",
                            f"this tower reads float [B,{self.shape[0]},{self.shape[1]}]")
        windows = signal.unfold(2, self.kernel, self.kernel).transpose(1, 2).flatten(2)
        return self.norm(F.linear(windows, self.weight))
