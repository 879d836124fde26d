"""An image tower under a head, as one part: what a classifier is made of, and what teaches another."""
from dataclasses import dataclass

from torch import Tensor

from polysense.base.system import Part, Spec


class Headed(Part):
    """Any image tower under any head (a dense layer, ViT's tanh MLP, nothing): [B,3,H,W] -> logits [B,C]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        backbone: Spec
        head: Spec

    def __init__(self, c: Config):
        super().__init__()
        self.backbone, self.head = c.backbone.build(), c.head.build()

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.backbone.pooled(image)).float()
