"""From alt-text to entity labels: which things of a knowledge base a text names, and which of them its picture shows.

A text is searched for names; each name may stand for several entities (a jaguar is a cat and a car); a score of picture and text, such as a CLIP's
cosine with "name, description", decides which are meant and drops what the picture does not show. What score is used is the caller's affair.
"""
from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from polysense.base.errors import UserError
from polysense.data.knowledge import WORD, lemmas
from polysense.data.retold import NO_LABEL, Retold
from polysense.data.sources import Sample, Source

Score = Callable[[int, Sequence[str]], Sequence[float]]             # (sample, texts) -> how well each fits its picture


@dataclass(frozen=True)
class Entity:
    """One thing: its id in the knowledge base, its name, and what is said of it."""
    id: str
    name: str
    description: str = ""

    @property
    def text(self) -> str:
        """The name with what tells it from its namesakes."""
        return f"{self.name}, {self.description}" if self.description else self.name


class EntityBase:
    """Entities by the words of their names."""

    def __init__(self, entities: Iterable[Entity]):
        self.entities = tuple(entities)
        self.named: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, e in enumerate(self.entities):
            self.named[tuple(WORD.findall(e.name.lower()))].append(i)
        if not self.entities or len({e.id for e in self.entities}) < len(self.entities):
            raise UserError("a knowledge base needs entities, each with an id of its own", "check the file")
        self.longest = max(map(len, self.named))

    @staticmethod
    def read(path: str | Path) -> EntityBase:
        """Lines of JSON, `{"id": "Q35694", "name": "jaguar", "description": "a big spotted cat"}`; without an id the name is one. UserError for
        a file that is none."""
        try:
            rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
            return EntityBase(Entity(str(r.get("id", r["name"])), str(r["name"]), str(r.get("description", ""))) for r in rows)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is no knowledge base ({type(error).__name__}: {error})",
                            'each line is {"id": ..., "name": ..., "description": ...}') from error

    def write(self, path: str | Path) -> Path:
        """All entities as lines that `read` takes back."""
        Path(path).write_text("".join(json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in self.entities), encoding="utf-8")
        return Path(path)

    def mentioned(self, text: str) -> list[list[int]]:
        """For each name found in a text, from left to right, the entities it may stand for. The longest name counts; plurals are read."""
        words, out, at = WORD.findall(text.lower()), list[list[int]](), 0
        while at < len(words):
            for n in range(min(self.longest, len(words) - at), 0, -1):
                span = words[at:at + n]
                forms = [tuple(span), *((*span[:-1], lemma) for lemma in lemmas(span[-1]))]
                if found := next((self.named[f] for f in forms if f in self.named), None):
                    out.append(found)
                    at += n - 1
                    break
            at += 1
        return out

    def link(self, text: str, fits: Callable[[Sequence[str]], Sequence[float]], threshold: float) -> list[tuple[int, float]]:
        """(entity, score) of what a text names and its picture shows, best first: of each name the candidate that fits best, if it reaches the
        threshold."""
        best: dict[int, float] = {}
        for candidates in self.mentioned(text):
            scores = list(fits([self.entities[c].text for c in candidates]))
            score, chosen = max(zip(scores, candidates, strict=True), key=lambda pair: pair[0])
            if score >= threshold:
                best[chosen] = max(score, best.get(chosen, score))
        return sorted(best.items(), key=lambda item: -item[1])


Links = list[dict[int, float]]                                       # of each sample: entity -> score


def links_of(said: Sequence[Sequence[str]], base: EntityBase, score: Score) -> Links:
    """What the texts of each sample name, with how well it fits the picture; of a name's candidates the one that fits best."""
    found: Links = []
    for i, texts in enumerate(said):
        best: dict[int, float] = {}
        for text in texts:
            for e, s in base.link(text, lambda asked, i=i: score(i, asked), -math.inf):
                best[e] = max(s, best.get(e, s))
        found.append(best)
    return found


def labels_of(links: Links, threshold: float, rare: int = 1) -> list[int]:
    """The best entity of each sample that reaches the threshold, among those that at least `rare` samples have; none becomes no label."""
    kept = [{e: s for e, s in each.items() if s >= threshold} for each in links]
    best = [max(each, key=lambda e: each[e]) if each else NO_LABEL for each in kept]
    often = Counter(best)
    return [e if e >= 0 and often[e] >= rare else NO_LABEL for e in best]


def worst(links: Links, share: float) -> float:
    """The score below which `share` of all mentions lie; -inf where none are to be dropped."""
    scores = sorted(s for each in links for s in each.values())
    place = share * (len(scores) - 1)
    low = int(place) if scores else 0
    return -math.inf if not scores or share <= 0 else scores[low] + (place - low) * (scores[min(low + 1, len(scores) - 1)] - scores[low])


class Linked(Retold):
    """The source with entities as labels. The captions of a labelled sample are its own and the entity's text; classes are the entities' ids."""

    def __init__(self, source: Source, base: EntityBase, label: Sequence[int]):
        def tell(i: int, about: Sample) -> Sample:
            more = [base.entities[label[i]].text] if label[i] >= 0 else []
            return about | {"label": label[i], "captions": [*about["captions"], *more]}
        super().__init__(source, tell, f"{source.name} linked", ("label",), tuple(e.id for e in base.entities))
        self.label = list(label)

    def labels(self) -> list[int]:
        return self.label
