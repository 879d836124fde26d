"""Samples drawn once and kept, for proofs whose arms would otherwise each render the same scenes again."""
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.batch import Batch
from polysense.base.plan import Feed
from polysense.data.loader import Loader
from polysense.data.sources import ListSource, Source, Subset


def kept(samples: Source) -> ListSource:
    """The same samples, in memory."""
    return ListSource(samples.name, [samples[i] for i in range(len(samples))], samples.offers, split=samples.split, classes=samples.classes)


def drawn_once(samples: Any, feed: Feed, tokenizer: Any, needs: tuple[str, ...]) -> dict[str, Tensor]:
    """All samples of a source as one batch, read as outside training; what is ragged is padded, words by 0 and all else by -1."""
    parts = list(Loader(samples, feed, tokenizer, batch_size=100, train=False, needs=needs))
    out: dict[str, Tensor] = {}
    for key in needs:
        most, fill = max(p[key].shape[1] for p in parts) if parts[0][key].ndim > 1 else 0, 0 if key == "text" else -1
        out[key] = torch.cat([F.pad(p[key], [0, 0] * (p[key].ndim - 2) + [0, most - p[key].shape[1]], value=fill) if most else p[key] for p in parts])
    return out


def batches(whole: dict[str, Tensor], size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches of it."""
    lot, n = torch.Generator().manual_seed(seed), len(next(iter(whole.values())))
    while True:
        for rows in torch.randperm(n, generator=lot)[:n // size * size].split(size):
            yield {key: value[rows] for key, value in whole.items()}


def large(scenes: Any) -> Subset:
    """The scenes whose thing is large: at 32 pixels the small ones are four pixels wide, and a short run learns backgrounds."""
    return Subset(scenes, [i for i in range(len(scenes)) if max(scenes.scene(i).things, key=lambda t: t.r).size == "large"])
