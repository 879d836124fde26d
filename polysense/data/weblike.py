"""Pairs as the web has them, made fit for training: tidy alt-texts, limits on texts and pictures, one copy of each, only what fits its picture; and
sources mixed by share (Cherti et al. 2023 on LAION; Pham et al. 2021, section 4). All of it is a pure function of the samples, whatever their order.
"""
from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.base.telling import Cleaned
from polysense.data.images import decode
from polysense.data.retold import Retold
from polysense.data.sources import BadSample, ConcatSource, Sample, Source, Subset

TAG, SPACE = re.compile(r"</?[A-Za-z][^<>]{0,80}>"), re.compile(r"\s+")
FILE = re.compile(r"(?i)^[\w()-]+\.(jpe?g|png|gif|webp|bmp|tiff?)$|^(img|dsc|image|photo)[ _-]?\d+$")
ADDRESS = re.compile(r"(?i)\b(?:https?://|www\.)\S+")
Fits = Callable[[Source, list[int], list[str]], Sequence[float]]     # (source, positions, their texts) -> cosines of picture and text


def tidy(text: str) -> str:
    """An alt-text as people would write it: entities resolved, tags and addresses gone, one kind of space; "" for the name of a file.

    Tidying twice changes nothing."""
    while (new := SPACE.sub(" ", ADDRESS.sub(" ", TAG.sub(" ", unicodedata.normalize("NFKC", html.unescape(text))))).strip()) != text:
        text = new
    return "" if FILE.match(text) else text


def print_of(picture: Any) -> bytes:
    """What two copies of a picture have in common: a hash of its pixels."""
    pixels = np.asarray(decode(picture).convert("RGB"))
    return hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode(), digest_size=16).digest()


def cleaned(source: Source, rules: Cleaned, fits: Fits | None = None) -> Source:
    """The samples that keep to the rules, their captions tidied. `fits`: who scores pictures and texts, for `rules.fit`.

    Of copies, same picture and same texts, the one of the smallest id stays, so that the order of the samples does not matter. UserError where
    nothing is left.
    """
    told = Retold(source, lambda i, about: about | {"captions": _good(about, rules)})
    rows = [i for i in range(len(told)) if _about(told, i).get("captions")]
    if rules.smallest or rules.ratio or rules.copies:
        rows = _pictures(told, rows, rules)
    if rules.fit is not None:
        if fits is None:
            raise UserError("nobody judges whether texts fit their pictures", "name one: judge=RUN, or judge=clip")
        score = fits(told, rows, [told.about(i)["captions"][0] for i in rows])
        rows = [i for i, s in zip(rows, score, strict=True) if s >= rules.fit]
    if not rows:
        raise UserError(f"no sample of {source.name} keeps to the rules", "loosen them: fewer words, smaller pictures, a lower fit")
    return Subset(told, rows)


def _about(source: Source, i: int) -> Sample:
    try:
        return source.about(i)
    except BadSample:
        return {}


def _good(about: Sample, rules: Cleaned) -> list[str]:
    said = dict.fromkeys(tidy(c) for c in about.get("captions") or ())
    return [c for c in said if rules.words[0] <= len(c.split()) <= rules.words[1] and any(map(str.isalpha, c))]


def _pictures(source: Source, rows: list[int], rules: Cleaned) -> list[int]:
    kept: dict[Any, int] = {}
    for i in sorted(rows, key=source.id):
        try:
            picture = decode(source.load(i, "image"))
        except BadSample:
            continue
        short, long = sorted(picture.size)
        if short < rules.smallest or (rules.ratio and long > rules.ratio * short):
            continue
        same = (print_of(picture), tuple(sorted(source.about(i)["captions"]))) if rules.copies == "one" else i
        kept.setdefault(same, i)
    return sorted(kept.values())


class Mixture(Subset):
    """A joined source whose parts stand in every batch by given shares, however large they are; an epoch is about as long as the source."""

    def __init__(self, base: Source, shares: Sequence[float]):
        super().__init__(base, range(len(base)))
        part = [part_of(base, i) for i in range(len(base))]
        self.parts = [np.flatnonzero(np.asarray(part) == k) for k in range(max(part) + 1)]
        if len(self.parts) != len(shares) or any(s <= 0 for s in shares) or any(not len(p) for p in self.parts):
            raise UserError(f"shares {tuple(shares)} for the {len(self.parts)} parts of {base.name}", "give one above 0 for each part that a + joins")
        self.shares = np.asarray(shares, float) / sum(shares)
        self.round = lcm(*(Fraction(float(s)).limit_denominator(100).denominator for s in self.shares))      # so many samples hold them exactly

    def arrange(self, rng: np.random.Generator) -> np.ndarray:
        """An order in which any stretch of samples holds the parts by their shares, as nearly as whole samples can; small parts come again."""
        n, owed = max(1, len(self) // self.round) * self.round, np.zeros(len(self.parts))
        drawn: list[list[int]] = [[] for _ in self.parts]
        out = np.empty(n, np.int64)
        for t in range(n):
            owed += self.shares
            k = int(owed.argmax())
            owed[k] -= 1
            if not drawn[k]:
                drawn[k] = rng.permutation(self.parts[k]).tolist()
            out[t] = drawn[k].pop()
        return out


def part_of(source: Any, i: int) -> int:
    """Which part of a joined source a sample is of, through whatever was told about it since; 0 where nothing was joined."""
    while not isinstance(source, ConcatSource):
        if isinstance(source, Subset):
            source, i = source.base, source.rows[i]
        elif isinstance(source, Retold):
            source = source.base
        else:
            return 0
    return source._at(i)[0]
