"""What a frozen tower says of every patch, as what a masked model predicts. Shapes: B batch, N patches, M hidden ones of the batch, D width."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.codes import shrink
from polysense.nn.head import Nothing
from polysense.nn.masking import Masking

NORMS = ("none", "unit", "layer")


class FeatureTarget(Part):
    """The patch tokens of a frozen tower behind its last norm, through its head, of the whole picture: CLIP's (MVP, EVA), DINO's (MaskFeat).

    Patches of the tower and of the student must be the same places: a grid of 14x14 is 224 px in patches of 16, or 112 px in patches of 8. norm:
    "unit" (length one), "layer" (each token less its mean, divided by its deviation), or "none".
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        tower: Spec
        head: Spec = field(default_factory=Nothing.Config)           # such as CLIP's projection into the joint space
        width: int                           # of what the head puts out
        size: int | None = None              # side of the picture that the tower reads; None: the student's, with the student's normalisation
        mean: tuple[float, ...] = (0.0, 0.0, 0.0)                    # with a size: of the feed
        std: tuple[float, ...] = (1.0, 1.0, 1.0)
        tower_mean: tuple[float, ...] = (0.0, 0.0, 0.0)              # and of the tower
        tower_std: tuple[float, ...] = (1.0, 1.0, 1.0)
        norm: str = "none"

    def __init__(self, c: Config):
        super().__init__()
        if c.norm not in NORMS:
            raise UserError(f"no norm={c.norm!r} of features", f"it is one of {', '.join(NORMS)}")
        self.tower, self.head, self.c = c.tower.build(), c.head.build(), c

    def whole(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W], as the feed says -> [B,N,width], of every patch, in float32."""
        return self.tokens(pixels)[:, self.tower.prefix:]

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """The same with the tower's prefix (the class token) in front."""
        c = self.c
        if c.size is not None:
            mean, std, their_mean, their_std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (c.mean, c.std, c.tower_mean, c.tower_std))
            pixels = (shrink((pixels * std + mean).clamp(0, 1), c.size) - their_mean) / their_std
        said = self.head(self.tower(pixels).tokens).float()
        if c.norm == "unit":
            return F.normalize(said, dim=-1)
        return F.layer_norm(said, said.shape[-1:]) if c.norm == "layer" else said

    def forward(self, pixels: Tensor, masking: Masking) -> Tensor:
        """-> [M,width], of the hidden patches. UserError where the tower's grid is not the student's."""
        said = self.whole(pixels)
        if said.shape[:2] != masking.mask.shape:
            raise UserError(f"the teacher has {said.shape[1]} patches, the student {masking.mask.shape[1]}",
                            "size / patch of the teacher must be image size / patch of the student")
        return said[masking.mask]
