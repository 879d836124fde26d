"""A backbone and a head over its pooled feature. Abstract: a system adds its objective and is final."""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from polysense.base.system import Spec, System


class Classifier(System):
    """Any image tower under any head (a dense layer, ViT's tanh MLP, nothing).

    `encode_image` is the pooled feature below the head, so the head can be swapped at transfer.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        backbone: Spec
        head: Spec

    def __init__(self, c: Config):
        super().__init__()
        self.backbone, self.head = c.backbone.build(), c.head.build()

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the backbone's pooled feature."""
        return F.normalize(self.backbone.pooled(image).float(), dim=-1)

    def classify(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> logits [B,C]."""
        return self.head(self.backbone.pooled(image)).float()
