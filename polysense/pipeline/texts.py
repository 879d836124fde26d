"""Texts alone: words that are missing, and one text from another."""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.base.spec import Spec, from_dict
from polysense.data.tokenizer import clean
from polysense.pipeline.talk import MOST, strategy
from polysense.train.precision import autocast

GAP = re.compile(r"\s*(?:\[MASK\]|<mask>|_{3,})")


@dataclass(frozen=True)
class Guess:
    """A word for a gap."""
    word: str
    probability: float


def fill(pipeline: Any, text: str, top: int = 5) -> list[list[Guess]]:
    """For each gap (`___`, `[MASK]` or `<mask>`) of a text the likeliest words, best first. A word may be a piece of one: `##ing` goes on with the
    word before it. Raises UserError for a text without gaps, or one that is too long."""
    pipeline._need("guess_words")
    parts = GAP.split(text)
    if len(parts) < 2:
        raise UserError(f"{text!r} has no gap", "write ___ where a word is missing")
    if top < 1:
        raise UserError(f"top={top}", "ask for at least one word")
    pipeline.read_texts([""])                            # refuses a checkpoint that came without its vocabulary
    own = pipeline.tokenizer
    ids, gaps = [own.start], list[int]()
    for part in parts:
        ids += own.engine.encode(clean(part), add_special_tokens=False).ids if part.strip() else []
        gaps.append(len(ids))
        ids.append(own.start)                            # stands in the gap; it is not read
    ids[gaps.pop()] = own.end
    if len(ids) > own.plan.length:
        raise UserError(f"a text of {len(ids)} tokens", f"the system reads {own.plan.length}: give a shorter one")
    given = torch.tensor([ids], device=pipeline.device)
    hidden = torch.zeros_like(given, dtype=torch.bool)
    hidden[0, gaps] = True
    with torch.inference_mode(), autocast("auto", pipeline.device)(True):
        chance = pipeline.system.guess_words(given, hidden).float().cpu()
    if not bool(chance.isfinite().all()):
        raise UserError("guess_words returned numbers that are not finite", "the weights are damaged, or their training diverged")
    special = (own.start, own.end, own.pad, own.unknown, *map(own.engine.token_to_id, ("[MASK]", "<mask>")))
    chance = chance.index_fill(1, torch.tensor([i for i in special if i is not None]), 0.0)
    best, which = chance[:, :own.vocab].topk(min(top, own.vocab), -1)
    return [[Guess(_word(own, int(i)), float(p)) for p, i in zip(row, words, strict=True)] for row, words in zip(best, which, strict=True)]


def _word(tokenizer: Any, i: int) -> str:
    token = tokenizer.token(i)
    return token if token.startswith("##") else tokenizer.decode([i]).strip() or token


def translate(pipeline: Any, texts: Sequence[str], *, max_new: int = MOST, how: str = "", seed: int = 0, batch_size: int = 32) -> list[str]:
    """The other text of each. how: "" (the system's own way), "greedy", "beam:5" or "sample:0.9", the last by `seed`. Raises UserError for no
    texts, an empty one, or one that is longer than the system reads."""
    pipeline._need("translate_text")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or any(not t.strip() for t in texts):
        raise UserError("there is nothing to translate", "give at least one text, none of them empty")
    if max_new < 1:
        raise UserError(f"max_new={max_new}", "ask for at least one token")
    chosen: Spec | None = None
    if how:
        chosen = strategy(how, seed) or from_dict({"is": "polysense.towers.decoding:Greedy.Config"})
        if "how" not in signature(pipeline.system.translate_text).parameters:
            raise UserError(f"{pipeline.id or 'this system'} writes in its own way", "leave how= out")
    out: list[str] = []
    for start in range(0, len(texts), batch_size):
        ids = pipeline.read_texts(texts[start:start + batch_size])
        with torch.inference_mode(), autocast("auto", pipeline.device)(True):
            new = pipeline.system.translate_text(ids, max_new=max_new, **({"how": chosen} if chosen else {}))
        out += [pipeline.tokenizer.decode(row) for row in new.cpu()]
    return out


class Texts:
    """The verbs of a Pipeline for texts alone."""

    def fill(self, text: str, *, top: int = 5) -> list[list[Guess]]:
        """For each gap (`___`) of a text the likeliest words with their probabilities: see `pipeline.texts.fill`."""
        return fill(self, text, top)

    def translate(self, texts: str | Sequence[str], *, max_new: int = MOST, how: str = "", seed: int = 0) -> list[str]:
        """The other text of each: see `pipeline.texts.translate`."""
        return translate(self, [texts] if isinstance(texts, str) else texts, max_new=max_new, how=how, seed=seed)
