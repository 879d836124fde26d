"""Pictures, texts and pairs of both as samples of one kind, so that a batch can hold all three."""
from __future__ import annotations

from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.data.retold import Retold
from polysense.data.sources import ConcatSource, Sample

PAIR, PICTURE, TEXT = 0, 1, 2                           # values of the batch key `has`
SILENCE, GREY = "-", np.full((8, 8, 3), 127, np.uint8)  # stand where a sample has no text, or no picture; nobody looks at them


class Cast(Retold):
    """A joined source, each part in the role that its offers give it: pictures with texts, pictures alone, texts alone."""

    def __init__(self, base: Any):
        if not isinstance(base, ConcatSource):
            raise UserError(f"{base.name} is one source", "join pictures, texts and pairs with +; of captioned pictures alone, leave the step out")
        self.roles = [PAIR if {"image", "text"} <= set(s.offers) else PICTURE if "image" in s.offers else TEXT for s in base.sources]
        if lost := [s.name for s, role in zip(base.sources, self.roles) if role == TEXT and "text" not in s.offers]:
            raise UserError(f"{lost[0]} has neither pictures nor texts", "leave it out")
        super().__init__(base, self._told, adds=("image", "text", "has"))
        self.joined = base

    def role(self, i: int) -> int:
        """Of sample i."""
        return self.roles[self.joined._at(i)[0]]

    def _told(self, i: int, about: Sample) -> Sample:
        role = self.role(i)
        return about | {"has": role} | ({"captions": [SILENCE]} if role == PICTURE else {})

    def heavy(self, i: int) -> tuple[str, ...]:
        return ("image",)

    def _load(self, i: int, key: str) -> Any:
        if key == "image" and self.role(i) == TEXT:
            return GREY
        k, j = self.joined._at(i)
        return self.joined.sources[k].load(j, key)
