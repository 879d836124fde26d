"""Zero-shot classification (Radford et al. 2021, section 3.1): the names of the classes, in prompts, are the classifier.

A system that compares patch by word (FILIP) has no one vector for a class: of its prompts the similarities are averaged, not the texts.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data import told
from polysense.data.templates import TEMPLATES
from polysense.tasks.encode import Features, Progress, class_names, encode_all_images, encode_all_texts, finite, frozen, name_of
from polysense.tasks.result import Result, classification


def run(subject: Any, test: Any, *, templates: str | Sequence[str] = "default", names: Sequence[str] | None = None,
        prompts: Sequence[Sequence[str]] | None = None, seed: int = 0, batch_size: int = 64, progress: Progress | None = None) -> Result:
    """Accuracy of the class whose prompts are nearest to the picture.

    `templates`: a set of templates.TEMPLATES by name, one template, or several; `names`: what the classes are called (None: the
    names in the data, underscores as spaces); `prompts`: all that is said of each class, in place of templates.
    """
    look = (lambda image: subject.system.encode_patches(image).flatten(1, 2)) if by_words(subject.system) else None
    seen = encode_all_images(subject, test, progress, batch_size=batch_size, encode=look)
    return judged("zero_shot", subject, seen, templates, names, seed, prompts)


def judged(exam: str, subject: Any, seen: Features, templates: str | Sequence[str], names: Sequence[str] | None, seed: int,
           prompts: Sequence[Sequence[str]] | None = None) -> Result:
    """The exam of features [n,D] that are there, or of patches [n,N,D] for a system that compares them with words."""
    chosen = templates_of(templates)
    features, label = seen.labelled()
    said = class_names(seen) if names is None else tuple(names)
    if names is None and not seen.classes:
        raise UserError(f"{seen.name!r} has labels without names", "give their names: names=[...]")
    if label.max() >= len(said):
        raise UserError(f"{len(said)} names were given", f"{seen.name!r} has labels up to {label.max()}")
    if prompts is not None and len(prompts) != len(said):
        raise UserError(f"prompts for {len(prompts)} classes", f"there are {len(said)}")
    everything = asked(subject, [s.replace("_", " ") for s in said], chosen) if prompts is None else prompts
    late = features.ndim == 3 and by_words(subject.system)
    scores = patch_scores(features, words_of(subject, everything)) if late else features @ rows_of(subject, everything).T
    notes = {**seen.notes(), **({"templates": len(chosen), "first_template": chosen[0]} if prompts is None else {"first_prompt": prompts[0][0]})}
    return classification(exam, name_of(subject), seen.name, scores.numpy(), label, said, seed=seed, notes=notes)


def zero_shot_classifier(subject: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit row [C,D] a class: each prompt normalised, their mean normalised again."""
    return rows_of(subject, asked(subject, names, templates))


def asked(subject: Any, names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """All that is said of each class. Where no template is asked for, a system that learned what stands around a name (CoOp) puts it as its feed
    says; one that learned with a dictionary (K-LITE) is asked with it."""
    feed = subject.preset.feed if getattr(subject, "preset", None) else None
    own = getattr(feed.text, "template", "") if feed else ""
    templates = (own,) if own and tuple(templates) == TEMPLATES["default"] else templates
    return told.prompts(feed, names, templates)


def by_words(system: Any) -> bool:
    """Whether a system compares patches with words."""
    return hasattr(system, "encode_words") and hasattr(system, "encode_patches")


def words_of(subject: Any, prompts: Sequence[Sequence[str]]) -> list[list[Tensor]]:
    """The words [L,D] of every prompt of every class, without padding. UserError for a class without one."""
    if not prompts or not all(prompts):
        raise UserError("a class has no prompt", "give at least one for each")
    with frozen(subject.system):
        rows = [[finite(subject.system.encode_words(subject.read_texts([p])), "encode_words")[0] for p in each] for each in prompts]
    return [[w[w.abs().sum(1) > 0] for w in each] for each in rows]


def patch_scores(patches: Tensor, said: Sequence[Sequence[Tensor]]) -> Tensor:
    """patches [n,N,D], the words of every prompt of every class -> [n,C]: of each prompt the mean over patches of their best word, of each class the
    mean over its prompts (Yao et al. 2022, FILIP, equation 4 and section 3.3)."""
    return torch.stack([torch.stack([(patches @ words.T).amax(2).mean(1) for words in each]).mean(0) for each in said], 1)


def rows_of(subject: Any, prompts: Sequence[Sequence[str]]) -> Tensor:
    """The same of any number of prompts a class: [C,D]. Their order does not matter. UserError for a class without one."""
    if not all(prompts):
        raise UserError("a class has no prompt", "give at least one for each")
    rows = encode_all_texts(subject, [p for each in prompts for p in each]).split([len(each) for each in prompts])
    return F.normalize(torch.stack([r.mean(0) for r in rows]), dim=-1)


def templates_of(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates by the name of their set, or as given; each needs a place {} for the class."""
    if isinstance(templates, str):
        if "{}" not in templates and templates not in TEMPLATES:
            raise UserError(f"no templates {templates!r}", f"there are {', '.join(TEMPLATES)}, or write one with {{}} where the class goes")
        return TEMPLATES.get(templates, (templates,))
    if not templates or any("{}" not in t for t in templates):
        raise UserError("every template needs {} where the class goes", "for example 'a photo of a {}.'")
    return tuple(templates)
