"""Image-text retrieval: R@1, R@5, R@10 and median rank, both ways, with any number of captions a picture.

A picture is found by a caption when it ranks high among all pictures; for a picture the best placed of its own captions counts, and its
other captions stand in nobody's way (Karpathy & Fei-Fei 2015). Ties count half: a system that finds everything alike earns the middle.
`rerank=k` lets systems that read pictures and texts together look at the k best once more (`rerank.py`). Systems that compare patch by word (FILIP)
are judged by those similarities, one for each way.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.tasks.encode import Features, Progress, encode_all_images, encode_all_texts, name_of
from polysense.tasks.rerank import Again, check_rerank, second_looks
from polysense.tasks.result import Metric, Result, Units, grouped_mean_of, grouped_median_of, metric
from polysense.tasks.zero_shot import by_words, words_of

AT = (1, 5, 10)


def run(subject: Any, test: Any, *, rerank: int = 0, seed: int = 0, batch_size: int = 64, progress: Progress | None = None) -> Result:
    """The mean of the six recalls comes first. Intervals draw whole pictures, with all their captions. rerank: how many get a second look."""
    if rerank:
        check_rerank(subject, test, rerank)
    look = partial(second_looks, subject, test, k=rerank) if rerank else None
    patches = (lambda image: subject.system.encode_patches(image).flatten(1, 2)) if by_words(subject.system) else None
    out = examined("retrieval", subject, encode_all_images(subject, test, progress, batch_size=batch_size, encode=patches), seed, look=look)
    return replace(out, notes={**out.notes, "rerank": rerank}) if rerank else out


def examined(exam: str, subject: Any, seen: Features, seed: int, thing: str = "image",
             look: Callable[..., tuple[Again, Again]] | None = None) -> Result:
    """The exam of features that are there: pictures [n,D], or videos of several vectors [n,K,D]. look: a second one, `rerank.second_looks`."""
    has = [i for i, said in enumerate(seen.captions) if said]
    if not has:
        raise UserError(f"no sample of {seen.name!r} has a caption", "use data with captions")
    owner = np.array([k for k, i in enumerate(has) for _ in seen.captions[i]])
    said = [c for i in has for c in seen.captions[i]]
    if thing == "image" and seen.features.ndim == 3 and by_words(subject.system):
        to_text, to_image = late_ranks(seen.features[has], [words for words, in words_of(subject, [[c] for c in said])], owner)
    else:
        texts = encode_all_texts(subject, said)
        again = look(has, said, seen.features[has], texts) if look else (None, None)
        to_text, to_image = ranks(seen.features[has], texts, owner, again=again)
    n, pictures = len(has), np.arange(len(has))
    ways = {f"{thing}_to_text": (to_text, pictures, chance_of_best(np.bincount(owner), len(owner))),
            f"text_to_{thing}": (to_image, owner, {k: min(1.0, k / n) for k in AT})}
    metrics: dict[str, Metric] = {}
    for way, (rank, group, chance) in ways.items():
        for k in AT:
            metrics[f"{way}_r{k}"] = metric(grouped_mean_of((rank <= k).astype(float), group, n), n, chance=chance[k], seed=seed)
        metrics[f"{way}_median_rank"] = metric(grouped_median_of(rank, group), n, seed=seed)
    hits = [(rank <= k).astype(float) for rank, _, _ in ways.values() for k in AT]
    groups = [group for _, group, _ in ways.values() for _ in AT]
    parts = [grouped_mean_of(h, g, n) for h, g in zip(hits, groups, strict=True)]
    guess = float(np.mean([chance[k] for _, _, chance in ways.values() for k in AT]))
    mean = metric(lambda w: np.mean([p(w) for p in parts], 0), n, chance=guess, seed=seed)
    notes = {**seen.notes(), "captions": len(owner), f"{'picture' if thing == 'image' else thing}s_without_caption": len(seen) - n}
    units = Units(np.stack([np.bincount(g, h, n) for h, g in zip(hits, groups, strict=True)]),
                  np.stack([np.bincount(g, minlength=n) for g in groups]))
    return Result(exam, name_of(subject), seen.name, n, {"mean_recall": mean, **metrics}, notes=notes, units=units)


def ranks(images: Tensor, texts: Tensor, owner: np.ndarray, block: int = 512,
          again: tuple[Again | None, Again | None] = (None, None)) -> tuple[np.ndarray, np.ndarray]:
    """(rank of each picture's best caption [n], rank of each caption's picture [m]); caption j [m,D] belongs to picture owner[j] [n,D].

    Things of several vectors [n,K,D] (videos) are as similar to a text as the nearest of these is.

    1 is best; equal others count half. Only `block` rows of the similarities exist at a time. again: what a second look found, each way.
    """
    own = torch.from_numpy(owner)
    images = images if images.ndim == 3 else images[:, None]
    to_text = np.empty(len(images))
    for s in range(0, len(images), block):
        similar = (images[s:s + block] @ texts.T).amax(1)
        similar = similar if again[0] is None else again[0].over(similar, s)
        mine = own[None] == torch.arange(s, s + len(similar))[:, None]
        best = similar.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        others = ~mine
        to_text[s:s + block] = _rank(similar, best, others)
    to_image = np.empty(len(texts))
    for s in range(0, len(texts), block):
        similar = (images @ texts[s:s + block].T).amax(1).T
        similar = similar if again[1] is None else again[1].over(similar, s)
        mine = own[s:s + block, None]
        others = torch.ones_like(similar, dtype=torch.bool).scatter_(1, mine, False)
        to_image[s:s + block] = _rank(similar, similar.gather(1, mine), others)
    return to_text, to_image


def late_ranks(patches: Tensor, words: Sequence[Tensor], owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `ranks`, of patches [n,N,D] and the words [L,D] of each caption: pictures rank captions by the mean over patches of their best word,
    captions rank pictures by the mean over words of their best patch (Yao et al. 2022, FILIP, equations 4 and 5)."""
    see, say = torch.empty(len(patches), len(words)), torch.empty(len(words), len(patches))
    for j, each in enumerate(words):
        met = patches @ each.T
        see[:, j], say[j] = met.amax(2).mean(1), met.amax(1).mean(1)
    own = torch.from_numpy(owner)
    mine = own[None] == torch.arange(len(patches))[:, None]
    found = _rank(see, see.masked_fill(~mine, -torch.inf).amax(1, keepdim=True), ~mine)
    return found, _rank(say, say.gather(1, own[:, None]), ~mine.T)


def _rank(similar: Tensor, own: Tensor, others: Tensor) -> np.ndarray:
    return (1 + ((similar > own) & others).sum(1) + ((similar == own) & others).sum(1) / 2).numpy()


def chance_of_best(captions: np.ndarray, m: int) -> dict[int, float]:
    """For k in AT, the chance that at least one of a picture's captions [n] is among k drawn from all m without replacement, mean over
    pictures: 1 - C(m - c, k) / C(m, k)."""
    miss = lambda c, k: float(np.prod([max(0.0, m - c - i) / (m - i) for i in range(min(k, m))]))
    values, times = np.unique(captions, return_counts=True)
    return {k: 1 - sum(t * miss(c, k) for c, t in zip(values, times, strict=True)) / len(captions) for k in AT}
