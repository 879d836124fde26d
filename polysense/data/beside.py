"""Two sources at a time: the samples of one, each beside a sample of another that has what the first lacks."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polysense.base.errors import UserError
from polysense.data.sources import FOLLOWS, HEAVY, Sample, Source, name_of


class BesideSource(Source):
    """Sample i is sample i of the longer source beside sample i of the shorter one, which begins again whenever it ends.

    For systems that learn from two streams at once, such as BEVT from clips and from photographs. The second adds pictures, clips, sounds or maps of
    a kind that the first does not offer, and nothing else: its captions and labels would seem to be about the first. UserError where it adds nothing.
    """

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second
        self.name, self.split = f"{first.name}?beside={second.name}", first.split
        self.added = tuple(k for k in HEAVY if k in second.offers and k not in first.offers)
        if not self.added:
            raise UserError(f"{second.name} has nothing to stand beside {first.name}: {first.name} offers {', '.join(first.offers)}",
                            f"to learn from both, join them: {first.name}+{second.name}")
        if not len(first) or not len(second):
            raise UserError(f"{(second if len(first) else first).name} has no samples", "is the folder empty?")
        follow = [f for k in self.added for f in FOLLOWS.get(k, ()) if f in second.offers]
        self.offers = (*first.offers, *self.added, *(f for f in follow if f not in first.offers))
        self.classes, self.tag_names = first.classes, getattr(first, "tag_names", ())
        sizes = [getattr(s, "largest", None) for s, mine in ((first, first.offers), (second, self.added)) if {"image", "video"} & set(mine)]
        self.largest = None if None in sizes or not sizes else max(sizes)
        self.rate = getattr(second if "audio" in self.added else first, "rate", None)
        self.notes = [(f"{s.name}/{name}", why) for s in (first, second) for name, why in getattr(s, "notes", ())]

    def __len__(self) -> int:
        return max(len(self.first), len(self.second))

    def id(self, i: int) -> str:
        return f"{name_of(self.first, i % len(self.first))} beside {name_of(self.second, i % len(self.second))}"

    def heavy(self, i: int) -> tuple[str, ...]:
        own = self.first.heavy(i % len(self.first))
        return (*own, *(k for k in self.second.heavy(i % len(self.second)) if k in self.added))

    def only(self, keys: Iterable[str]) -> Source:
        keys = list(keys)
        made = BesideSource.__new__(BesideSource)
        made.__dict__.update(self.__dict__, first=self.first.only(keys), second=self.second.only(keys))
        return made

    def _about(self, i: int) -> Sample:
        return {k: v for k, v in self.first.about(i % len(self.first)).items() if k != "id"}

    def _load(self, i: int, key: str) -> Any:
        return self.second.load(i % len(self.second), key) if key in self.added else self.first.load(i % len(self.first), key)
