"""Carries out what a feed says about its samples (`base.telling`): the one way by which training, comparisons and proofs get such texts and labels,
and by which prompts and queries are asked."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.base.telling import Cleaned, Entities, Glosses, Mixed, Rewrites, Roles, Telling, ToldFeed, Triplets
from polysense.data import data_root
from polysense.data.entities import Entity, EntityBase, Linked, Score, labels_of, links_of, worst
from polysense.data.knowledge import Knowledge, informed
from polysense.data.retold import triplets
from polysense.data.rewrites import brings_rewrites, rewritten
from polysense.data.roles import Cast
from polysense.data.scenes.glossary import GLOSSES
from polysense.data.scenes.palette import COLOURS, SHAPES
from polysense.data.sources import Source
from polysense.data.weblike import Fits, Mixture, cleaned

FEW = 1000                                              # samples looked at to see whether a dictionary or a knowledge base fits the data


class Judge(Protocol):
    """Says how well texts fit pictures."""

    def score(self, source: Source, base: EntityBase, rows: list[int]) -> Score:
        """(sample, texts of entities) -> cosines. The samples are those of `source`; only `rows` of them will be asked for."""
        ...

    def features(self, source: Source, texts: list[str], rows: list[int]) -> tuple[Any, Any]:
        """Unit features of the pictures at `rows` [len(source),D], nought elsewhere, and of the texts [T,D]."""
        ...


def tellings(feed: Feed) -> tuple[Telling, ...]:
    """The steps of a feed; none for most."""
    return feed.told if isinstance(feed, ToldFeed) else ()


def told(source: Any, feed: Feed, judge: Judge | None = None) -> Any:
    """The source as its feed tells it. judge: who the `Entities` step asks; None: names alone decide.

    Pure in (source, feed): what is said of a sample does not depend on when it is asked for. Raises UserError where the data, or a file that a step
    names, do not hold what it needs.
    """
    for k, telling in enumerate(tellings(feed)):
        source = _told(source, telling, f"feed.told.{k}", judge)
    return source


def _told(source: Any, telling: Telling, path: str, judge: Judge | None) -> Any:
    match telling:
        case Triplets(templates=templates):
            return triplets(source, templates)
        case Rewrites(files=files, voices=voices):
            if not files and not voices and not brings_rewrites(source):
                raise UserError(f"{source.name} holds no rewrites of its captions",
                                "put them beside each picture (x.rewrites.txt, a column `rewrites`), name files with one line for each sample "
                                f"({path}.files=\"('one.txt',)\"), or let rules reword ({path}.voices=\"('chat','human')\")")
            return rewritten(source, *files, voices=voices)
        case Glosses(dictionary=name):
            book = dictionary(name, path)
            made = informed(source, book)
            if book.entries and hasattr(source, "__len__") and not any(
                    len(made.about(i)["captions"]) > len(source.about(i)["captions"]) for i in range(min(FEW, len(source)))):
                raise UserError(f"the dictionary {name!r} explains nothing that {source.name} names", f"give one that does: {path}.dictionary=FILE")
            return made
        case Entities():
            return _entities(source, telling, path, judge)
        case Cleaned():
            if not hasattr(source, "__len__"):
                raise UserError("copies and misfits are looked for in all of the data, which a stream does not show",
                                "index the tars: leave ?stream=1 out")
            return cleaned(source, telling if judge else telling.but(fit=None), None if judge is None else fits_of(judge))
        case Roles():
            return Cast(source)
        case Mixed(shares=shares):
            return Mixture(source, shares)
    raise UserError(f"nobody carries out {type(telling).__name__}", "was the preset written by another version of polysense?")


def _entities(source: Any, telling: Entities, path: str, judge: Judge | None) -> Source:
    if not hasattr(source, "__len__"):
        raise UserError("entities are looked for in all of the data, which a stream does not show", "index the tars: leave ?stream=1 out")
    if "text" not in source.offers:
        raise UserError(f"{source.name} has no captions that could name an entity", "give captioned data")
    base = entity_base(telling.base, path)
    said = [source.about(i).get("captions", ()) for i in range(len(source))]
    rows = [i for i, texts in enumerate(said) if any(map(base.mentioned, texts))]
    if not rows:
        raise UserError(f"no caption of {source.name} names one of the {len(base.entities):,} entities of {telling.base!r}",
                        f"give a knowledge base that fits ({path}.base=FILE.jsonl); where labels of the data are the entities, leave the step out: "
                        'feed.told="()"')
    links = links_of(said, base, judge.score(source, base, rows) if judge else lambda i, texts: [1.0] * len(texts))
    return Linked(source, base, labels_of(links, worst(links, telling.dropped) if judge else -float("inf"), telling.rare))


def fits_of(judge: Judge) -> Fits:
    """The cosine of each picture and its text."""
    def fits(source: Source, rows: list[int], texts: list[str]) -> list[float]:
        said = list(dict.fromkeys(texts))
        seen, known = judge.features(source, said, rows)
        place = {t: k for k, t in enumerate(said)}
        return [float(seen[i] @ known[place[t]]) for i, t in zip(rows, texts, strict=True)]
    return fits


def found(name: str, endings: Sequence[str], what: str, field: str) -> Path:
    """A file by its path, or by its name in the data folder. UserError says what to give."""
    for place in (Path(name).expanduser(), *(data_root() / f"{name}{e}" for e in endings)):
        if place.is_file():
            return place
    raise UserError(f"there is no {what} {name!r}", f"give a file ({field}=FILE{endings[0]}), or put {name}{endings[0]} into {data_root()}")


def dictionary(name: str, path: str = "feed.told.N") -> Knowledge:
    """A dictionary by name or path; read once."""
    if name == "scenes":
        return Knowledge.of(GLOSSES)
    place = found(name, (".jsonl", ".json"), "dictionary", f"{path}.dictionary")
    return _read(str(place), place.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(place: str, changed: int) -> Knowledge:
    return Knowledge.read(place)


def entity_base(name: str, path: str = "feed.told.N") -> EntityBase:
    """A knowledge base by name or path."""
    if name == "scenes":
        return EntityBase(Entity(f"{c} {s}", f"{c} {s}", f"{GLOSSES[s]}, in {GLOSSES[c]}") for c in COLOURS for s in SHAPES)
    return EntityBase.read(found(name, (".jsonl",), "knowledge base", f"{path}.base"))


# Asking in the form of the texts of training

def book_of(feed: Feed | None) -> Knowledge:
    """The dictionary that prompts are asked with. Empty for feeds without one, and, with a warning, where its file is no longer there: what is
    known of a name is then not said, as of names that the dictionary lacks."""
    for telling in tellings(feed) if feed else ():
        if isinstance(telling, Glosses):
            try:
                return dictionary(telling.dictionary)
            except UserError as error:
                warnings.warn(f"{error.what}: prompts are asked without its knowledge ({error.advice})", stacklevel=2)
    return Knowledge()


def prompts(feed: Feed | None, names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """All that is said of each class: the templates with its name, with knowledge where the feed has some."""
    return book_of(feed).prompts(names, templates)


def queries(feed: Feed | None, texts: Sequence[str]) -> list[str]:
    """Texts that ask for something, with knowledge where the feed has some."""
    book = book_of(feed)
    return [book.ask(t) for t in texts] if book.entries else list(texts)
