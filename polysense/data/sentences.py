"""Text without pictures: files of sentences or of pairs of texts, and how sentences become one text for BERT and RoBERTa."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import PackPlan, PairPlan, TextPlan
from polysense.data.sources import BadSample, ListSource, Sample, Source
from polysense.data.tokenizer import clean

TRIES = 20                                              # samples asked for a sentence from elsewhere


def text_source(path: Path, split: str = "train") -> ListSource:
    """A text file. Where every line holds two texts with one tab between them, each line is a pair: what is read and what is to be written
    (`question` and `answer`). Else each line is a sentence, and blank lines stand between documents; a file without blank lines is one document
    of each line. Raises UserError for a file that is empty or not UTF-8."""
    try:
        lines = [line.strip(" \r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read texts from {str(path)!r}", "give a UTF-8 file with one sentence a line") from error
    said = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not said:
        raise UserError(f"{str(path)!r} holds no text", "write one sentence a line, blank lines between documents")
    if all(line.count("\t") == 1 and all(p.strip() for p in line.split("\t")) for _, line in said):
        rows = [(f"line {n}", [p.strip() for p in line.split("\t")]) for n, line in said]
        return ListSource(str(path), [{"id": name, "question": a, "answer": b, "captions": [a, b]} for name, (a, b) in rows],
                          ("text", "question", "answer"), split=split)
    documents: list[tuple[int, list[str]]] = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            if not documents or (documents[-1][1] and (len(said) == len(lines) - (not lines[-1]) or not lines[n - 2].strip())):
                documents.append((n, []))
            documents[-1][1].append(line)
    return ListSource(str(path), [{"id": f"line {n}", "captions": text} for n, text in documents], ("text",), split=split)


class Sentences:
    """`Sentences(plan, tokenizer, source)(positions, samples, rngs)` -> `text` [B,L] with `text_mask`; for pairs `segment` [B,L], `follows` [B].

    A document is the captions of one sample in their order. Raises UserError for a stream, whose other samples cannot be asked for.
    """

    def __init__(self, plan: TextPlan | None, tokenizer: Any, source: Any):
        if not isinstance(plan, PairPlan | PackPlan):
            raise UserError("this system's feed does not say how sentences become one text", "give it a PairPlan or a PackPlan")
        if not hasattr(source, "__len__") or len(source) < 2:
            raise UserError("sentences of other samples are needed, which a stream or a single sample does not have", "give data on this machine")
        self.plan, self.tokenizer, self.source = plan, tokenizer, source

    def __call__(self, positions: Sequence[int], abouts: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> dict[str, Tensor]:
        if isinstance(self.plan, PackPlan):
            packed = [self.packed(i, a) for i, a in zip(positions, abouts, strict=True)]
            return self._batch([(ids, [0] * len(ids)) for ids in packed])
        made = [self.pair(i, a, rng) for i, a, rng in zip(positions, abouts, rngs, strict=True)]
        return {**self._batch([(ids, kinds) for ids, kinds, _ in made]), "follows": torch.tensor([f for *_, f in made], dtype=torch.int64)}

    def words(self, text: str) -> list[int]:
        """Token ids without start and end."""
        return self.tokenizer.engine.encode(clean(text), add_special_tokens=False).ids

    def pair(self, i: int, about: Sample, rng: np.random.Generator) -> tuple[list[int], list[int], int]:
        """(ids, segments, whether B follows A) of sample i. What is too long loses words at the end of the longer sentence."""
        first, second = two_of(about, rng)
        follows = int(rng.random() < 0.5)
        if not follows:
            second = two_of(self._other(i, rng), rng)[1]
        a, b = self.words(first), self.words(second)
        while len(a) + len(b) > self.plan.length - 3:
            (a if len(a) > len(b) else b).pop()
        end = self.tokenizer.end
        return [self.tokenizer.start, *a, end, *b, end], [0] * (len(a) + 2) + [1] * (len(b) + 1), follows

    def _other(self, i: int, rng: np.random.Generator) -> Sample:
        """What is said of another sample than i, one that can be read."""
        n = len(self.source)
        for _ in range(TRIES):
            try:
                return self._about((i + 1 + int(rng.integers(n - 1))) % n)
            except BadSample:
                continue
        raise UserError(f"none of {TRIES} samples of {self.source.name} can be read", "check the data with `polysense data show`")

    def _about(self, i: int) -> Sample:
        return self.source.about(i) if isinstance(self.source, Source) else self.source[i]

    def packed(self, i: int, about: Sample) -> list[int]:
        """Ids of the sentences of sample i and of those behind it, as many as fit whole; a first sentence that is too long is cut."""
        end, n, between, place = self.tokenizer.end, len(self.source), 0, i
        room, out = self.plan.length - 1, [self.tokenizer.start]
        while True:
            for text in said_of(about):
                ids = self.words(text)
                if len(out) + between + len(ids) > room:
                    return [*(out if len(out) > 1 else [*out, *ids][:room]), end]
                out, between = [*out, *[end] * between, *ids], 0
            place, between = (place + 1) % n, 1
            if place == i:
                return [*out, end]
            try:
                about = self._about(place)
            except BadSample:
                about = {"captions": []}

    def _batch(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        text, segment = torch.full(mask.shape, self.tokenizer.pad, dtype=torch.int64), torch.zeros(mask.shape, dtype=torch.int64)
        text[mask] = torch.tensor([t for ids, _ in rows for t in ids], dtype=torch.int64)
        segment[mask] = torch.tensor([k for _, kinds in rows for k in kinds], dtype=torch.int64)
        return {"text": text, "text_mask": mask} | ({"segment": segment} if isinstance(self.plan, PairPlan) else {})


def said_of(about: Sample) -> list[str]:
    """The sentences of a sample."""
    return [c for c in about["captions"] if c.strip()]


def two_of(about: Sample, rng: np.random.Generator) -> tuple[str, str]:
    """Two sentences of a document that follow each other; of a single one its two halves (a sentence here is any span of words: Devlin et al.
    2019, section 3)."""
    said = said_of(about)
    if len(said) > 1:
        k = int(rng.integers(len(said) - 1))
        return said[k], said[k + 1]
    words = said[0].split()
    half = (len(words) + 1) // 2
    return " ".join(words[:half]), " ".join(words[half:])
