"""A backbone and a head over its pooled feature. Abstract: a system adds its objective and is final."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.system import Batch, Losses, System
from polysense.mechanisms.mixing import Mixing
from polysense.objectives.classify import softmax_ce
from polysense.towers.headed import Headed


class Classifier(Headed, System):
    """`encode_image` is the pooled feature below the head, so the head can be swapped at transfer."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Headed.Config):
        pass

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the backbone's pooled feature."""
        return F.normalize(self.backbone.pooled(image).float(), dim=-1)

    def classify(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> logits [B,C]."""
        return self(image)

    def ten_crops(self, image: Tensor, size: int) -> Tensor:
        """image [B,3,H,W] -> class probabilities [B,C]: the mean softmax over the corners, the centre, and all five mirrored (Krizhevsky et al.
        2012, section 4.1). Raises UserError for a picture smaller than a crop."""
        return torch.stack([self.classify(crop).softmax(-1) for crop in ten_crops(image, size)]).mean(0)


class MixedClassifier(Classifier):
    """Learns from pictures that are mixed with one another, and their labels with them (mixup, CutMix); labels may be smoothed."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Classifier.Config):
        mix: Mixing.Config
        smoothing: float = 0.0

    def __init__(self, c: Config):
        super().__init__(c)
        self.mix, self.smoothing = c.mix.build(), c.smoothing

    def losses(self, batch: Batch) -> Losses:
        image, target = self.mix(batch["image"], batch["label"])
        return Losses(label=softmax_ce(self.classify(image), target, self.smoothing))


def ten_crops(image: Tensor, size: int) -> list[Tensor]:
    """image [B,3,H,W] -> its ten crops [B,3,size,size]."""
    high, wide = image.shape[-2] - size, image.shape[-1] - size
    if high < 0 or wide < 0:
        raise UserError(f"no crops of {size} pixels in a picture of {image.shape[-2]} x {image.shape[-1]}", "read the pictures larger")
    places = ((0, 0), (0, wide), (high, 0), (high, wide), (high // 2, wide // 2))
    crops = [image[..., y:y + size, x:x + size] for y, x in places]
    return crops + [c.flip(-1) for c in crops]
