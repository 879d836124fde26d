"""Conversations about pictures as LLaVA's instruction files hold them: a JSON list of {id, image, conversations: [{from, value}, ...]}."""
from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.data.sources import Sample, Source, offered

PLACE = "<image>"
USER, REPLY = ("human", "user"), ("gpt", "assistant")
BLANK = np.full((8, 8, 3), 128, np.uint8)


def talks(path: Path) -> bool:
    """Whether a JSON file begins like a list of conversations."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16).lstrip()
    return head.startswith("[") and '"conversations"' in head


class Conversations(Source):
    """One conversation a sample: `chat`, its (said, replied) pairs in order; `image`, read from the folder `images`.

    A conversation without a picture has `picture_free` and a blank picture; `kinds` tells them apart, so that batches do not mix them. Options
    of a path: `instruct.json?images=pictures/`. Raises UserError for a file that is something else.
    """

    def __init__(self, path: Path, images: Path):
        self.name, self.images = path.name, images
        try:
            rows: Any = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not JSON", str(error)) from error
        self.notes = []
        self.rows: list[tuple[str, str | None, list[tuple[str, str]]]] = []
        for n, row in enumerate(rows if isinstance(rows, list) else []):
            said = _pairs(row)
            if said:
                self.rows.append((str(row.get("id", n)), row.get("image"), said))
            else:
                self.notes.append((str(n), "has no turn of a user followed by a reply"))
        if not self.rows:
            raise UserError(f"{path} holds no conversations", "it should be a list of {id, image, conversations: [{from, value}, ...]}")
        self.offers = offered(("image", "text", "question", "answer"))

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, i: int) -> str:
        return self.rows[i][0]

    def kinds(self) -> list[int]:
        return [int(image is None) for _, image, _ in self.rows]

    def _about(self, i: int) -> Sample:
        _, image, chat = self.rows[i]
        return {"chat": chat, "question": chat[0][0], "answer": chat[0][1], "captions": [chat[0][1]], "picture_free": image is None}

    def _load(self, i: int, key: str) -> Any:
        image = self.rows[i][1]
        return BLANK if image is None else self.images / image


def _pairs(row: Any) -> list[tuple[str, str]]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    turns = turns if isinstance(turns, list) else []
    said = [(str(t.get("from")), str(t.get("value", "")).replace(PLACE, "").strip()) for t in turns if isinstance(t, dict)]
    return [(a, b) for (one, a), (two, b) in pairwise(said) if one in USER and two in REPLY and b]
