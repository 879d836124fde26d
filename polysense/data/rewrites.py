"""Captions said in other words: who rewrites them, how a language model is asked, and the source that draws among all tellings.

Rewriting happens once, before training, line by line: line i of a file of rewrites belongs to sample i. The original always stays one of the
texts. Who rewrites is exchangeable: a file that exists already, a language model (anything that continues a prompt: one of this library, a chat
endpoint), or `Paraphraser`, a set of rules that needs no model and says less.
"""
from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from polysense.base.errors import UserError
from polysense.data.retold import retold, said
from polysense.data.sources import Sample, Source

Pair = tuple[str, str]
SHOWN, LEAST = 3, 2                                     # examples in a prompt; words that a rewrite must have
INSTRUCTION = "Say what the caption says in other words. Keep every thing that it names.\n\n"

# One pool for each voice. A few of our own making; any list of (source, target) pairs may take their place.
POOLS: dict[str, tuple[Pair, ...]] = {
    "chat": (("man riding a horse on the beach at sunset", "As the sun goes down over the sea, a man rides his horse along the beach."),
             ("fresh bread for sale", "Loaves of freshly baked bread wait for buyers at a market stall."),
             ("old red truck in a field", "An old red truck stands abandoned in the middle of a wide field."),
             ("city skyline at night", "The lights of the city glitter along its skyline after dark.")),
    "assistant": (("two dogs play with a ball", "A pair of dogs are chasing one ball, full of energy and joy."),
                  ("woman reading a book in a park", "On a bench in a quiet park, a woman is deep in her book."),
                  ("bowl of fruit on a table", "A table is set with a bowl that holds all kinds of fruit."),
                  ("boats in the harbor", "Small boats are moored side by side in the calm harbor.")),
    "pairs": (("a cat sleeps on a sofa", "A cat lying fast asleep on top of a couch."),
              ("a train arrives at the station", "A passenger train pulling into a railway station."),
              ("children fly kites", "A group of kids are out flying kites together."),
              ("a plate with pizza and salad", "Some pizza beside a salad on a white plate.")),
    "human": (("kitchen with wooden cabinets", "This kitchen has cabinets made of wood."),
              ("surfer on a big wave", "Somebody surfs a wave that is taller than he is."),
              ("a clock tower against a blue sky", "You can see a tower with a clock, the sky behind it is blue."),
              ("sheep on a green hill", "There are sheep grazing up on a green hill.")),
}


def prompt(caption: str, pool: Sequence[Pair], rng: np.random.Generator) -> str:
    """The instruction, three different examples of the pool, never of this caption itself, and the caption to be rewritten."""
    others = [p for p in pool if p[0].strip().lower() != caption.strip().lower()]
    if len(others) < SHOWN:
        raise UserError(f"a pool of {len(others)} other captions", f"give at least {SHOWN} (source, target) pairs")
    shown = [others[i] for i in rng.choice(len(others), SHOWN, replace=False)]
    return INSTRUCTION + "".join(f"{a} => {b}\n" for a, b in shown) + f"{caption} =>"


class Rewriter(ABC):
    """Says a caption in other words, the same for the same random numbers."""

    @abstractmethod
    def rewrite(self, caption: str, pool: str, rng: np.random.Generator) -> str:
        """The caption in the voice of a pool."""


class Continued(Rewriter):
    """A language model that continues a prompt, `write(prompt, seed) -> str`: its first line counts. Sample at temperature 0.9, top-p 0.95."""

    def __init__(self, write: Callable[[str, int], str], pools: dict[str, tuple[Pair, ...]] | None = None):
        self.write, self.pools = write, pools or POOLS

    def rewrite(self, caption: str, pool: str, rng: np.random.Generator) -> str:
        said = self.write(prompt(caption, self.pools[pool], rng), int(rng.integers(2 ** 31))).strip()
        return said.splitlines()[0].strip() if said else ""


FRAMES: dict[str, tuple[str, ...]] = {
    "chat": ("a picture that shows {}", "here we can see {} in the scene", "the scene shows {}"),
    "assistant": ("there is {} to be seen", "you are looking at {}", "what you see is {}"),
    "pairs": ("an image with {} in it", "{} is shown in this picture", "a view of {}"),
    "human": ("i can see {} here", "this is {}", "look, {}"),
}
AROUND = re.compile(r"^(?:(?:an?|the) (?:photo|picture|image|drawing|scene) (?:of|with|that shows) )?(.*?)[.!]?$", re.I)


class Paraphraser(Rewriter):
    """Rules in place of a language model: frames around the caption and its own words in another order. A labelled stand-in, not the method."""

    def rewrite(self, caption: str, pool: str, rng: np.random.Generator) -> str:
        found = AROUND.match(caption.strip())
        core = found[1] if found and found[1] else caption.strip()
        frames = FRAMES[pool]
        return frames[int(rng.integers(len(frames)))].replace("{}", core)


def rewrite_lines(captions: Sequence[str], rewriter: Rewriter, pool: str, seed: int = 0, done: Sequence[str] = ()) -> list[str]:
    """One line for each caption. Line i depends on (seed, pool, i) alone, so what was `done` before an interruption is simply continued."""
    place = sorted(POOLS).index(pool) if pool in POOLS else sum(pool.encode())
    made = list(done)
    for i in range(len(done), len(captions)):
        made.append(" ".join(rewriter.rewrite(captions[i], pool, np.random.default_rng([seed, place, i])).split()))
    return made


def rewrite_file(source: Source, path: str | Path, rewriter: Rewriter, pool: str, seed: int = 0, batch: int = 64) -> Path:
    """Writes the rewrites of the first caption of every sample, line by line; an interrupted file is continued, a finished one left alone."""
    path = Path(path)
    captions = [source.about(i)["captions"][0] for i in range(len(source))]
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    done = old.splitlines()[:None if old.endswith("\n") or not old else -1]            # a line that breaks off is made again
    if old and not old.endswith("\n"):
        path.write_text("".join(f"{line}\n" for line in done), encoding="utf-8")
    if len(done) > len(captions):
        raise UserError(f"{path.name} has {len(done)} lines for {len(captions)} samples", "it belongs to other data: choose another file")
    while len(done) < len(captions):
        upto = min(len(done) + batch, len(captions))
        more = rewrite_lines(captions[:upto], rewriter, pool, seed, done)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in more[len(done):])
        done = more
    return path


def rewritten(source: Any, *tellings: str | Path | Sequence[str], voices: Sequence[str] = ()) -> Any:
    """The source with M more tellings of each caption: those that a sample brings (`rewrites`), and those of files or lists of lines. Where it has
    none, `Paraphraser` rewords it once in each voice. Training draws among all M + 1 alike.

    A telling of fewer than two words counts as the original; of several originals each is as often there. UserError where a telling has not one
    line for each sample, or a voice is unknown.
    """
    lines = [read_lines(t) if isinstance(t, str | Path) else list(t) for t in tellings]
    for t, each in zip(tellings, lines, strict=True):
        if not hasattr(source, "__len__") or len(each) != len(source):
            raise UserError(f"{t if isinstance(t, str | Path) else 'a list of rewrites'} has {len(each)} lines for "
                            f"{len(source) if hasattr(source, '__len__') else 'a stream of'} samples",
                            "line i belongs to sample i: rewrite the same data again")
    if unknown := [v for v in voices if v not in FRAMES]:
        raise UserError(f"nobody rewords in the voice {unknown[0]!r}", f"the voices are {', '.join(FRAMES)}")
    rules = Paraphraser()

    def tell(i: int, about: Sample) -> Sample:
        own = said(about)
        more = [*about.get("rewrites", ()), *(each[i] for each in lines)]
        others = [c for text in more for c in (own if len(text.split()) < LEAST else [text] * len(own))]
        if not more:                                    # by rules, which are the same for the same sample
            seed = crc32(str(about["id"]).encode())
            others = [rules.rewrite(c, v, np.random.default_rng([seed, k, n])) for k, v in enumerate(voices) for n, c in enumerate(own)]
        return about | {"captions": [*own, *others]}
    return retold(source, tell, f"{source.name} retold")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file of rewrites. UserError where there is none."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"no file of rewrites at {path}", "give a text file with one line for each sample")
    return Path(path).expanduser().read_text(encoding="utf-8").splitlines()


def brings_rewrites(source: Any, few: int = 100) -> bool:
    """Whether any of the first samples of a source brings rewrites of its own; True of a stream, which is not looked into."""
    return not hasattr(source, "__len__") or any(source.about(i).get("rewrites") for i in range(min(few, len(source))))
