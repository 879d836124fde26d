"""Easy data augmentation of texts (Wei & Zou 2019): another telling of a sentence by one small change. Works on words, needs no model."""
from __future__ import annotations

import numpy as np

SHARE = 0.1                                             # of the words that a change touches, at least one; and the chance that a word is left out

# Everyday words of captions that may stand for each other; each line is one set.
_SETS = (
    "picture photo image photograph", "man guy gentleman", "woman lady", "child kid", "children kids", "boy lad", "girl lass", "people persons folks",
    "big large huge", "small little tiny", "pretty beautiful lovely", "street road", "car automobile", "bicycle bike", "house home",
    "sofa couch", "shop store", "rock stone", "woods forest", "hill slope", "sea ocean", "boat vessel", "plane airplane aircraft", "dog hound",
    "cat kitty", "rabbit bunny", "near beside", "above over", "below under beneath", "behind past", "shows displays depicts", "holds grips",
    "sits rests", "runs races", "walks strolls", "jumps leaps", "looks gazes", "happy glad cheerful", "sad unhappy", "quick fast rapid", "old aged",
    "new fresh", "bright vivid", "dark dim", "gray grey", "crimson red", "purple violet", "several many", "few some", "circle disc", "round circular",
    "cup mug", "plate dish", "meal food", "trousers pants", "shoes footwear", "bag purse", "watch timepiece", "shirt blouse", "jacket coat",
    "begins starts", "ends finishes", "end finish", "wide broad", "close shut", "tall high", "drawing sketch", "field meadow",
    "path trail", "town city",
)
SYNONYMS: dict[str, tuple[str, ...]] = {w: tuple(o for o in s.split() if o != w) for s in _SETS for w in s.split()}


def eda(text: str, rng: np.random.Generator) -> str:
    """One of synonym replacement, random swap and random deletion, drawn alike. At least one word stays; a text of one word is returned as it is."""
    words = text.split()
    if len(words) < 2:
        return text
    return " ".join((replaced, swapped, thinned)[int(rng.integers(3))](words, rng))


def replaced(words: list[str], rng: np.random.Generator) -> list[str]:
    """Some words that have a synonym become one; where none has, two words swap places."""
    known = [i for i, w in enumerate(words) if w.lower() in SYNONYMS]
    if not known:
        return swapped(words, rng)
    out = list(words)
    for i in rng.permutation(known)[:count(words)]:
        options = SYNONYMS[words[i].lower()]
        out[i] = options[int(rng.integers(len(options)))]
    return out


def swapped(words: list[str], rng: np.random.Generator) -> list[str]:
    """Pairs of different places change their words."""
    out = list(words)
    for _ in range(count(words)):
        i, j = rng.choice(len(out), 2, replace=False)
        out[i], out[j] = out[j], out[i]
    return out


def thinned(words: list[str], rng: np.random.Generator) -> list[str]:
    """Each word is left out with a small chance; if none stays, one at random does."""
    kept = [w for w in words if rng.random() >= SHARE]
    return kept or [words[int(rng.integers(len(words)))]]


def count(words: list[str]) -> int:
    """How many changes a text of these words gets."""
    return max(1, round(SHARE * len(words)))
