"""Byte-pair encoding that sometimes leaves a merge out, so that a model meets a word in several spellings (Provilkov et al. 2020, BPE-dropout).

The tokenizers library can do it too, but draws from random numbers that cannot be seeded; a batch here depends on (seed, position) alone.
"""
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.tokenizer import Tokenizer, clean


class Splitter:
    """`Splitter(tokenizer, chance).encode(texts, rngs)` -> ids and mask as `tokenizer.encode` gives them, every merge of a word left out with
    that chance each time it is considered; with a chance of 0 they are the same. UserError for a tokenizer that has no merges."""

    def __init__(self, tokenizer: Tokenizer, chance: float):
        if not 0 <= chance < 1:
            raise UserError(f"merges are left out with a chance of {chance}", "give one from 0 to below 1")
        model = json.loads(tokenizer.engine.to_str())["model"]
        if "merges" not in model or tokenizer.new:
            raise UserError("only words of plain byte-pair encoding can be split anew", "leave feed.text.dropout out")
        self.tokenizer, self.chance, self.vocab = tokenizer, chance, model["vocab"]
        self.rank = {tuple(m if isinstance(m, list) else m.split(" ")): i for i, m in enumerate(model["merges"])}
        self.end_mark, self.unknown = model.get("end_of_word_suffix") or "", self.vocab.get(model.get("unk_token"))

    def word(self, letters: str, rng: np.random.Generator) -> list[int]:
        """The ids of one word, as the byte-level splitter writes it."""
        parts = [*letters[:-1], letters[-1] + self.end_mark]
        while len(parts) > 1:
            pairs = [(self.rank[p], i) for i, p in enumerate(pairwise(parts)) if p in self.rank]
            kept = [pair for pair, u in zip(pairs, rng.random(len(pairs)), strict=True) if u >= self.chance]
            if not kept:
                break
            at = min(kept)[1]
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        ids: list[Any] = [self.vocab.get(p, self.unknown) for p in parts]
        return [i for i in ids if i is not None]

    def encode(self, texts: Sequence[str], rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Texts and a source of chance for each -> (ids int64 [B, L], mask bool [B, L])."""
        own, engine, rows = self.tokenizer, self.tokenizer.engine, []
        for text, rng in zip(texts, rngs, strict=True):
            words = engine.pre_tokenizer.pre_tokenize_str(engine.normalizer.normalize_str(clean(text)))
            said = [i for word, _ in words for i in self.word(word, rng)][:own.plan.length - 2]
            rows.append(torch.tensor([own.start, *said, own.end]))
        mask = torch.arange(max(len(r) for r in rows)) < torch.tensor([len(r) for r in rows])[:, None]
        ids = torch.full(mask.shape, own.pad)
        ids[mask] = torch.cat(rows)
        return ids, mask
