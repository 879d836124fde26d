"""Two towers, one space. Abstract: a system adds its objective and is final."""
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.system import After, Spec, System


class DualEncoder(System):
    """Image and text towers, a head on each into a shared space, and a learned temperature.

    The temperature is stored as `log_scale` (CLIP, section 2.5: multiplied onto the cosines as exp(log_scale), kept at or below
    `max_scale`). Features are normalised in float32 whatever the autocast type.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec
        text: Spec
        image_head: Spec
        text_head: Spec
        scale: float = 1 / 0.07
        max_scale: float = 100.0

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.text = c.vision.build(), c.text.build()
        self.image_head, self.text_head = c.image_head.build(), c.text_head.build()
        self.log_scale = nn.Parameter(torch.tensor(log(c.scale)))
        self.max_log_scale = log(c.max_scale)

    @property
    def scale(self) -> Tensor:
        """exp(log_scale), never above `max_scale`. The clamp passes gradient at the bound, where after_step keeps it."""
        return self.log_scale.clamp(max=self.max_log_scale).exp()

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm."""
        return F.normalize(self.image_head(self.vision.pooled(image)).float(), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] token ids -> [B,D], unit norm."""
        return F.normalize(self.text_head(self.text.pooled(text)).float(), dim=-1)

    def encode_patches(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,D], unit norm: the tower's local features through the same head."""
        return F.normalize(self.image_head(self.vision.dense(image)).float(), dim=-1)

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        self.log_scale.clamp_(max=self.max_log_scale)
