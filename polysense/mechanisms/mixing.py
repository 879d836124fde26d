"""Pictures and labels mixed with those of other samples of the batch. Shapes: B batch, C classes."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class Mixing(Part):
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), one of the two a batch where both are asked for. Random numbers come from torch's
    global generator; in eval mode nothing is mixed."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        classes: int
        mixup: float = 0.8                   # alpha of the Beta distribution that the share is drawn from; 0: never
        cutmix: float = 1.0
        switch: float = 0.5                  # chance of CutMix where both are asked for

    def __init__(self, c: Config):
        super().__init__()
        if min(c.mixup, c.cutmix) < 0 or not 0 <= c.switch <= 1:
            raise UserError(f"mixup={c.mixup}, cutmix={c.cutmix}, switch={c.switch}", "the first two are at least 0, the last lies in [0, 1]")
        self.c = c

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W], label int [B] -> pictures mixed with those of the reversed batch, and class weights [B,C] that sum to one.
        UserError for labels beyond the classes."""
        c = self.c
        if int(label.max()) >= c.classes:
            raise UserError(f"a label {int(label.max())} among {c.classes} classes",
                            "set classes of the mixing and out of the head to those of the data")
        target = F.one_hot(label, c.classes).float()
        if not self.training or not (c.mixup or c.cutmix):
            return image, target
        cut = bool(c.cutmix) and (not c.mixup or float(torch.rand(())) < c.switch)
        alpha = torch.tensor(c.cutmix if cut else c.mixup)
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        other = image.flip(0)
        if cut:
            image, share = pasted(image, other, share)
        else:
            image = share * image + (1 - share) * other
        return image, share * target + (1 - share) * target.flip(0)


def pasted(image: Tensor, other: Tensor, share: float) -> tuple[Tensor, float]:
    """CutMix, equation 1: a box of about 1 - share of the area, anywhere, comes from `other` -> (pictures, share of the area that is left)."""
    high, wide = image.shape[-2:]
    h, w = int(high * (1 - share) ** 0.5), int(wide * (1 - share) ** 0.5)
    y, x = int(torch.randint(high, ())), int(torch.randint(wide, ()))
    top, bottom, left, right = max(0, y - h // 2), min(high, y + h // 2), max(0, x - w // 2), min(wide, x + w // 2)
    out = image.clone()
    out[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return out, 1 - (bottom - top) * (right - left) / (high * wide)
