"""A contrastive loss chosen by name, in place of a recipe's own objective: what comparisons vary."""
from dataclasses import dataclass
from inspect import signature
from math import log
from typing import Any

from torch import Tensor

from polysense.base.batch import Losses
from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.objectives import contrastive

NAMES = {"info_nce": "info_nce", "sigmoid": "sigmoid_loss"}      # what it is called in a comparison -> function of objectives.contrastive


@dataclass(frozen=True, kw_only=True)
class Contrast(Spec):
    """`Stage.objective` as a value: a loss over the unit features `image` and `text` [B,D] of a dual encoder and its learned scale.

    A loss that also takes a bias (the sigmoid one) gets -log(B - 1), with which the odds of a pair start as they are, one in B: a system whose own
    objective it is not has no learned one.
    """
    of: str

    def __call__(self, system: Any, seen: dict[str, Tensor]) -> Losses:
        if self.of not in NAMES:
            raise UserError(f"no contrastive loss {self.of!r}", f"there are {', '.join(NAMES)}")
        image, text = seen["image"], seen["text"]
        loss = getattr(contrastive, NAMES[self.of])
        more = {"bias": -log(max(1, len(image) - 1))} if "bias" in signature(loss).parameters else {}
        return Losses(contrast=loss(image, text, system.scale, **more))
