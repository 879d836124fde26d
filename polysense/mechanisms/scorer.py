"""A frozen judge of how well pictures and texts agree: CLIP's weights, as a part of another system."""
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part


class Scorer(Part):
    """Two towers and their heads, by the names of a dual encoder, so that `Start(into="scorer", from_="clip")` fills it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec
        text: Spec
        image_head: Spec
        text_head: Spec
        size: int                            # side of the pictures that it reads
        mean: tuple[float, ...]              # how they are normalised
        std: tuple[float, ...]

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.text, self.image_head, self.text_head = (s.build() for s in (c.vision, c.text, c.image_head, c.text_head))
        self.log_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))
        self.c = c

    @torch.no_grad()
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W] in [0,1], text [B,L] ids of the scorer's own tokenizer -> cosines [B]."""
        c = self.c
        if image.shape[-2:] != (c.size, c.size):
            image = F.interpolate(image, (c.size, c.size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (image.new_tensor(v).view(1, -1, 1, 1) for v in (c.mean, c.std))
        seen = F.normalize(self.image_head(self.vision.pooled((image - mean) / std)).float(), dim=-1)
        return (seen * F.normalize(self.text_head(self.text.pooled(text)).float(), dim=-1)).sum(-1)
