"""Planes of one channel as three-channel pictures, for towers that learned on photographs."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.check import check_image


class ThreeChannels(Part):
    """A map of distances, or of heat: cut to [0, far], divided by far, repeated three times and normalised (Zhu et al. 2024, LanguageBind)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        far: float = 1.0                     # what becomes 1: ten where the map is in metres
        mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
        std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    mean: Tensor
    std: Tensor

    def __init__(self, c: Config):
        super().__init__()
        self.far = c.far
        for name, value in (("mean", c.mean), ("std", c.std)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def share(self, plane: Tensor) -> Tensor:
        """plane [B,1,H,W] -> the same in [0, 1]."""
        check_image(plane, 1)
        return plane.clamp(0, self.far) / self.far

    def forward(self, plane: Tensor) -> Tensor:
        """plane [B,1,H,W] -> [B,3,H,W]."""
        return (self.share(plane) - self.mean) / self.std
