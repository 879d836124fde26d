"""The same samples with something else said about them: prompts in place of labels, no labels, other words, more words."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polysense.base.errors import UserError
from polysense.data.sources import BadSample, Sample, Source, offered
from polysense.data.templates import TEMPLATES

NO_LABEL = -1                                           # of a pair from the web: it is like no other sample
Tell = Callable[[int, Sample], Sample]


class Retold(Source):
    """A source through `tell(i, about) -> about`, which may change captions and labels; pictures and ids stay. `adds`: batch keys that it fills."""

    def __init__(self, base: Source, tell: Tell, name: str = "", adds: Sequence[str] = (), classes: Sequence[str] = ()):
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
        return {k: v for k, v in self.tell(i, self.base.about(i)).items() if k != "id"}

    def _load(self, i: int, key: str) -> Any:
        return self.base.load(i, key)


class RetoldStream:
    """The same of a stream, whose samples have no numbers: `tell` gets -1 for them."""

    def __init__(self, base: Any, tell: Tell, name: str = "", adds: Sequence[str] = ()):
        self.base, self.tell, self.name, self.split = base, tell, name or base.name, base.split
        self.offers = tuple(dict.fromkeys((*base.offers, *offered(adds))))
        self.classes, self.tag_names, self.largest, self.rate = base.classes, base.tag_names, base.largest, base.rate
        self.samples, self.load = base.samples, base.load

    @property
    def notes(self) -> Sequence[tuple[str, str]]:
        return self.base.notes

    def about(self, raw: Any) -> Sample:
        about = self.base.about(raw)
        return self.tell(-1, about) | {"id": about["id"]}

    def captions(self) -> Iterator[str]:
        """All texts of one pass, no picture decoded: what a tokeniser is trained on. Unreadable samples are left out."""
        for raw in self.base.samples(0, 0, False):
            try:
                yield from self.about(raw).get("captions", ())
            except BadSample:
                continue


def retold(base: Any, tell: Tell, name: str = "", adds: Sequence[str] = ()) -> Any:
    """Any source, also a stream, told about by a function that does not need its samples' numbers."""
    return Retold(base, tell, name, adds) if hasattr(base, "__len__") else RetoldStream(base, tell, name, adds)


def prompted(base: Source, templates: Sequence[str], name: str = "") -> Retold:
    """Labelled pictures as image-text-label triplets: the captions of a sample are the templates with the name of its class. UserError for a
    template without {} or a source without class names."""
    if not base.classes or any("{}" not in t for t in templates) or not templates:
        raise UserError(f"{base.name!r} cannot be told by {list(templates)}", "classes need names, and every template {} where the name goes")
    names = [c.replace("_", " ") for c in base.classes]
    return Retold(base, lambda i, about: about | {"captions": [t.replace("{}", names[int(about["label"])]) for t in templates]}, name, ("text",))


def said(about: Sample) -> list[str]:
    """The captions of a sample that say anything."""
    return [c for c in about.get("captions") or () if c.strip()]


def triplets(base: Any, templates: str | Sequence[str], name: str = "") -> Any:
    """Labelled and captioned samples as (picture, text, label): those without captions are called by their class in all templates (a set of
    `data.templates` by name), those without a label get NO_LABEL. UserError where a part has neither captions nor names of classes."""
    chosen = TEMPLATES.get(templates) if isinstance(templates, str) else tuple(templates)
    if not chosen or any("{}" not in t for t in chosen):
        raise UserError(f"there are no templates {templates!r}", f"give {', '.join(TEMPLATES)}, or prompts with {{}} where the name goes")
    for part in getattr(base, "sources", [base]):
        if "text" not in part.offers and not ("label" in part.offers and part.classes):
            raise UserError(f"{part.name} has neither captions nor classes with names", "give data that say what is in the pictures")
    names = [c.replace("_", " ") for c in base.classes]

    def tell(i: int, about: Sample) -> Sample:
        label = NO_LABEL if about.get("label") is None else int(about["label"])
        own = said(about) or ([t.replace("{}", names[label]) for t in chosen] if 0 <= label < len(names) else [])
        return about | {"captions": own, "label": label}
    return retold(base, tell, name, ("text", "label"))
