"""Options of exams that name files: what is typed becomes what the exam takes."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polysense.base.errors import UserError

COMPARES = ("views", "reconstruction")


def exam_options(exam: str, words: Sequence[str]) -> dict[str, Any]:
    """`["seed=1", "lpips=vgg.pth,vgg16.pth"]` -> keyword arguments of the exam. lpips=FILE[,FILE]: exams that compare pictures measure that
    distance too."""
    from polysense.base.spec import parse_overrides

    options = parse_overrides(list(words))
    if "lpips" in options:
        if exam not in COMPARES:
            raise UserError(f"{exam} compares no pictures, so lpips= has nothing to measure", f"it is for the exams {' and '.join(COMPARES)}")
        options["distance"] = perceptual([p for p in str(options.pop("lpips")).split(",") if p])
    return options


def perceptual(paths: Sequence[str], config: Any = None) -> Any:
    """The perceptual distance in published files: lpips' whole state, or its linears and torchvision's vgg16 in any order."""
    import torch

    from polysense.decoders.perceptual import Perceptual
    from polysense.weights.lpips import load_perceptual

    if not paths:
        raise UserError("lpips= names no file", "give lpips' own vgg.pth and torchvision's vgg16, with a comma between them")
    config = config or Perceptual.Config()
    part = config.build().eval()
    load_perceptual(part, config, *paths)

    def distance(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return part(one, two)
    return distance
