"""Two things that a masked model says of hidden patches: what they are, and what the encoder itself makes of them. B batch, M hidden, D width."""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.mechanisms.teacher import Teacher
from polysense.nn.masking import Masking


class AlignedTarget(Part):
    """`truth` of the hidden patches, and their features: the encoder reads the hidden patches as it reads the visible ones, alone, without a
    gradient (Chen et al. 2022, CAE, section 3.1: the latent representation alignment).

    With a momentum of 0, as published, the teacher is the encoder itself after every step, bit for bit.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        truth: Spec                          # such as CodeTarget.Config: [B*M] or [B*M,W] in the order of the grid
        teacher: Teacher.Config = field(default_factory=lambda: Teacher.Config(momentum=0.0))

        @property
        def width(self) -> int:
            """What the decoder puts out for a patch."""
            return self.truth.width  # type: ignore[attr-defined]

        def of(self, encoder: nn.Module) -> "AlignedTarget":
            """A target that begins as the encoder."""
            return AlignedTarget(self, encoder)

    def __init__(self, c: Config, encoder: nn.Module):
        super().__init__()
        self.truth: Any = c.truth.build()
        self.teacher = c.teacher.of(encoder)

    def refresh(self, encoder: nn.Module) -> None:
        self.teacher.refresh(encoder)

    def move(self, encoder: nn.Module, progress: float) -> None:
        self.teacher.move(encoder, progress)

    @torch.no_grad()
    def features(self, pixels: Tensor, masking: Masking) -> Tensor:
        """pixels [B,3,H,W] -> [B,M,D] of the hidden patches, which see each other and the class token only, in the order of the grid."""
        return self.teacher(pixels, keep=masking.hidden.sort(1).values).tokens[:, self.teacher.module.prefix:]

    @torch.no_grad()
    def forward(self, pixels: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """-> (truth of the hidden patches, their features)."""
        return self.truth(pixels, masking), self.features(pixels, masking)
