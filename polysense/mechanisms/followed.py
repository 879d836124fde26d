"""What an average of the encoder itself says of every patch, as what a masked model predicts. Shapes: B batch, N patches, M hidden ones, D width."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.mechanisms.teacher import Teacher
from polysense.nn.masking import Masking

NORMS = ("layers", "none")


class FollowedTarget(Part):
    """The mean over the last `top` blocks of a moving average of the encoder, which sees the whole picture (Baevski et al. 2022, data2vec).

    norm "layers": each block's output is layer-normed without parameters, they are averaged, and the mean is layer-normed again (section 3.3 and
    released code); "none": the plain mean. The average belongs to the part: nothing but `move` changes it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        teacher: Teacher.Config = field(default_factory=lambda: Teacher.Config(momentum=0.9998, mode="eval"))
        top: int = 6                         # blocks
        norm: str = "layers"

        def of(self, encoder: nn.Module) -> "FollowedTarget":
            """A target that begins as the encoder."""
            return FollowedTarget(self, encoder)

    def __init__(self, c: Config, encoder: nn.Module):
        super().__init__()
        depth = len(encoder.body.blocks)  # type: ignore[union-attr, arg-type]
        if c.norm not in NORMS or not 1 <= c.top <= depth:
            raise UserError(f"top={c.top} of {depth} blocks, norm={c.norm!r}", f"top lies between 1 and {depth}, norm is one of {', '.join(NORMS)}")
        self.teacher, self.top, self.norm = c.teacher.of(encoder), c.top, c.norm

    def refresh(self, encoder: nn.Module) -> None:
        self.teacher.refresh(encoder)

    def move(self, encoder: nn.Module, progress: float) -> None:
        self.teacher.move(encoder, progress)

    @torch.no_grad()
    def whole(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W], nothing hidden -> [B,N,D] in float32."""
        held = self.teacher.module
        said = [x[:, held.prefix:].float() for x in held.features(pixels)[-self.top:]]
        if self.norm == "none":
            return torch.stack(said).mean(0)
        mean = torch.stack([F.layer_norm(x, x.shape[-1:]) for x in said]).mean(0)
        return F.layer_norm(mean, mean.shape[-1:])

    def forward(self, pixels: Tensor, masking: Masking) -> Tensor:
        """-> [M,D], of the hidden patches, samples one after the other, in the order of the grid."""
        return self.whole(pixels)[masking.mask]
