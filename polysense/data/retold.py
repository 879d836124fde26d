"""The same samples with something else said about them: prompts in place of labels, no labels, other words, more words."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polysense.base.errors import UserError
from polysense.data.sources import Sample, Source, offered

NO_LABEL = -1                                           # of a pair from the web: it is like no other sample


class Retold(Source):
    """A source through `tell(i, about) -> about`, which may change captions and labels; pictures and ids stay. `adds`: batch keys that it fills."""

    def __init__(self, base: Source, tell: Callable[[int, Sample], Sample], name: str = "", adds: Sequence[str] = (), classes: Sequence[str] = ()):
        self.base, self.tell = base, tell
        self.name, self.split = name or base.name, base.split
        self.offers = tuple(dict.fromkeys((*base.offers, *offered(adds))))
        self.classes, self.tag_names = tuple(classes) or base.classes, base.tag_names
        self.largest, self.rate, self.notes = base.largest, base.rate, base.notes

    def __len__(self) -> int:
        return len(self.base)

    def id(self, i: int) -> str:
        return self.base.id(i)

    def kinds(self) -> list[int] | None:
        return self.base.kinds()

    def heavy(self, i: int) -> tuple[str, ...]:
        return self.base.heavy(i)

    def _about(self, i: int) -> Sample:
        about = self.base.about(i)
        about.pop("id", None)
        return self.tell(i, about)

    def _load(self, i: int, key: str) -> Any:
        return self.base.load(i, key)


def prompted(base: Source, templates: Sequence[str], name: str = "") -> Retold:
    """Labelled pictures as image-text-label triplets: the captions of a sample are the templates with the name of its class. UserError for a
    template without {} or a source without class names."""
    if not base.classes or any("{}" not in t for t in templates) or not templates:
        raise UserError(f"{base.name!r} cannot be told by {list(templates)}", "classes need names, and every template {} where the name goes")
    names = [c.replace("_", " ") for c in base.classes]
    return Retold(base, lambda i, about: about | {"captions": [t.replace("{}", names[int(about["label"])]) for t in templates]}, name, ("text",))


def unlabelled(base: Source, name: str = "") -> Retold:
    """Captioned pictures as triplets: each belongs to no class but its own."""
    return Retold(base, lambda i, about: about | {"label": NO_LABEL}, name, ("label",))
