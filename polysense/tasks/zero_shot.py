"""Zero-shot classification (Radford et al. 2021, section 3.1): the names of the classes, in prompts, are the classifier."""
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.tasks.encode import Features, Progress, class_names, encode_all_images, encode_all_texts, name_of
from polysense.tasks.result import Result, classification
from polysense.tasks.templates import TEMPLATES


def run(subject: Any, test: Any, *, templates: str | Sequence[str] = "default", names: Sequence[str] | None = None, seed: int = 0,
        batch_size: int = 64, progress: Progress | None = None) -> Result:
    """Accuracy of the class whose prompts are nearest to the picture.

    `templates`: a set of templates.TEMPLATES by name, one template, or several; `names`: what the classes are called (None: the
    names in the data, underscores as spaces).
    """
    return judged("zero_shot", subject, encode_all_images(subject, test, progress, batch_size=batch_size), templates, names, seed)


def judged(exam: str, subject: Any, seen: Features, templates: str | Sequence[str], names: Sequence[str] | None, seed: int) -> Result:
    """The exam of features [n,D] that are there."""
    chosen = templates_of(templates)
    features, label = seen.labelled()
    said = class_names(seen) if names is None else tuple(names)
    if names is None and not seen.classes:
        raise UserError(f"{seen.name!r} has labels without names", "give their names: names=[...]")
    if label.max() >= len(said):
        raise UserError(f"{len(said)} names were given", f"{seen.name!r} has labels up to {label.max()}")
    classifier = zero_shot_classifier(subject, [s.replace("_", " ") for s in said], chosen)
    notes = {**seen.notes(), "templates": len(chosen), "first_template": chosen[0]}
    return classification(exam, name_of(subject), seen.name, (features @ classifier.T).numpy(), label, said, seed=seed, notes=notes)


def zero_shot_classifier(subject: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit row [C,D] a class: each prompt normalised, their mean normalised again."""
    prompts = [t.replace("{}", name) for name in names for t in templates]
    rows = encode_all_texts(subject, prompts).view(len(names), len(templates), -1)
    return F.normalize(rows.mean(1), dim=-1)


def templates_of(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates by the name of their set, or as given; each needs a place {} for the class."""
    if isinstance(templates, str):
        if "{}" not in templates and templates not in TEMPLATES:
            raise UserError(f"no templates {templates!r}", f"there are {', '.join(TEMPLATES)}, or write one with {{}} where the class goes")
        return TEMPLATES.get(templates, (templates,))
    if not templates or any("{}" not in t for t in templates):
        raise UserError("every template needs {} where the class goes", "for example 'a photo of a {}.'")
    return tuple(templates)
