"""Frozen features, computed once. Frozen means frozen: eval mode, no graph, every tensor of the system as it was, modes put back."""
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.sources import BadSample

Progress = Callable[[int, int], object]
TOWERS = ("tower", "backbone", "encoder", "vision")      # what systems call the image tower that encode_image reads
READS = ("pooled", "cls", "mean", "cls+mean", "cls4")


@dataclass(frozen=True)
class Features:
    """Unit features of a source's pictures with what exams need beside them; stands in for the source in `take`."""
    name: str
    offers: tuple[str, ...]
    classes: tuple[str, ...]
    features: Tensor                                     # [n,D] float32 on the CPU; where asked for, [n,N,D]
    labels: np.ndarray                                   # int64 [n], -1 where a sample has none
    captions: list[list[str]]
    skipped: list[tuple[str, str]] = field(default_factory=list)     # (sample id, reason)

    def __len__(self) -> int:
        return len(self.features)

    def labelled(self) -> tuple[Tensor, np.ndarray]:
        """Features and labels of the samples that have one; UserError where none has."""
        has = self.labels >= 0
        if not has.any():
            raise UserError(f"no sample of {self.name!r} has a label", "use data with labels")
        return self.features[torch.from_numpy(has)], self.labels[has]

    def notes(self) -> dict[str, Any]:
        return {"skipped": [list(s) for s in self.skipped]} if self.skipped else {}


def tower_of(system: Any, method: str) -> Any:
    """The image tower of a system, if it has such a method; else None."""
    return next((t for t in (getattr(system, name, None) for name in TOWERS) if hasattr(t, method)), None)


def reader(system: Any, tokens: str) -> Callable[[Tensor], Tensor] | None:
    """image [B,3,H,W] -> the feature that `tokens` names: "pooled", what encode_image says (None here); of the last block, behind the last norm, the
    class token "cls", the "mean" of the patches, or both side by side "cls+mean"; "cls4", the class tokens of the last four blocks (Caron et al.
    2021, DINO, appendix F). UserError for an unknown word, or a system whose tower has no such tokens."""
    if tokens not in READS:
        raise UserError(f"no features called {tokens!r}", f"they are {', '.join(READS)}")
    if tokens == "pooled":
        return None
    tower = tower_of(system, "last")
    prefix, last = getattr(tower, "prefix", -1), 4 if tokens == "cls4" else 1
    if tower is None or prefix < (tokens != "mean") or len(tower.body.blocks) < last:
        raise UserError(f"{type(system).__name__} has no tower with tokens for {tokens!r}", "take tokens=pooled")

    def read(image: Tensor) -> Tensor:
        layers = tower.last(image, last)
        first, rest = torch.cat([x[:, 0] for x in layers], 1), layers[-1][:, prefix:].mean(1)
        return {"mean": rest, "cls+mean": torch.cat([first, rest], 1)}.get(tokens, first)
    return read


@contextmanager
def frozen(system: Any) -> Iterator[None]:
    """Eval mode without a graph; afterwards each module is in the mode it was in."""
    modes = [(m, m.training) for m in system.modules()]
    system.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def sample_of(source: Any, i: int) -> dict[str, Any] | BadSample:
    """A sample, or why it cannot be read."""
    try:
        return source[i]
    except BadSample as bad:
        return bad


def encode_all_images(subject: Any, source: Any, progress: Progress | None = None, *, batch_size: int = 64,
                      encode: Callable[[Tensor], Tensor] | None = None) -> Features:
    """Features of every readable picture of a source, in its order; unreadable ones are listed in `skipped`.

    `encode`: in place of `encode_image`, such as one that gives the places of a picture, [n,N,D]. `progress(done, total)` after each batch.
    Features given in place of a source are returned as they are. Raises UserError where no picture can be read or the system returns numbers that
    are not finite.
    """
    if isinstance(source, Features):
        return source
    rows: list[Tensor] = []
    labels: list[int] = []
    captions: list[list[str]] = []
    skipped: list[tuple[str, str]] = []

    with ThreadPoolExecutor(4) as pool, frozen(subject.system):
        for start in range(0, len(source), batch_size):
            got = list(pool.map(lambda i: sample_of(source, i), range(start, min(start + batch_size, len(source)))))
            skipped += [(s.id, s.reason) for s in got if isinstance(s, BadSample)]
            if good := [s for s in got if not isinstance(s, BadSample)]:
                rows.append(finite((encode or subject.system.encode_image)(subject.read_images([s["image"] for s in good])), "encode_image"))
                labels += [int(s.get("label", -1)) for s in good]
                captions += [[c for c in s.get("captions", ()) if c.strip()] for s in good]
            if progress:
                progress(min(start + batch_size, len(source)), len(source))
    if not rows:
        raise UserError(f"no picture of {source.name!r} can be read", skipped[0][1] if skipped else "it is empty")
    return Features(source.name, tuple(source.offers), tuple(source.classes), torch.cat(rows), np.array(labels, np.int64), captions, skipped)


def encode_each(subject: Any, source: Any, key: str, encode: Callable[[Any], Tensor], progress: Progress | None = None) -> Features:
    """Unit features [n,K,D] of the videos or sounds of a source, `encode(sample[key]) -> [K,D]`, one at a time as they differ in length; one of
    fewer vectors repeats its last. Labels, captions and `skipped` as in `encode_all_images`, and the same errors.
    """
    if isinstance(source, Features):
        return source
    rows: list[Tensor] = []
    labels: list[int] = []
    captions: list[list[str]] = []
    skipped: list[tuple[str, str]] = []
    with frozen(subject.system):
        for i in range(len(source)):
            try:
                sample = source[i]
            except BadSample as bad:
                skipped.append((bad.id, bad.reason))
                continue
            rows.append(finite(encode(sample[key]), f"encode_{key}"))
            labels.append(int(sample.get("label", -1)))
            captions.append([c for c in sample.get("captions", ()) if c.strip()])
            if progress:
                progress(i + 1, len(source))
    if not rows:
        raise UserError(f"no {key} of {source.name!r} can be read", skipped[0][1] if skipped else "it is empty")
    most = max(len(r) for r in rows)                     # a vector more of the same changes no maximum
    padded = torch.stack([torch.cat([r, r[-1:].expand(most - len(r), -1)]) for r in rows])
    return Features(source.name, tuple(source.offers), tuple(source.classes), padded, np.array(labels, np.int64), captions, skipped)


def encode_all_texts(subject: Any, texts: Sequence[str], progress: Progress | None = None, *, batch_size: int = 256) -> Tensor:
    """Unit features [n,D] float32 of strings, on the CPU; a text that occurs several times is encoded once, so that it ties with itself."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    unique = list(place)
    rows: list[Tensor] = []
    with frozen(subject.system):
        for start in range(0, len(unique), batch_size):
            rows.append(finite(subject.system.encode_text(subject.read_texts(unique[start:start + batch_size])), "encode_text"))
            if progress:
                progress(min(start + batch_size, len(unique)), len(unique))
    return torch.cat(rows)[torch.tensor([place[t] for t in texts])]


def finite(features: Tensor, capability: str) -> Tensor:
    features = features.float().cpu()
    if not features.isfinite().all():
        raise UserError(f"{capability} returned numbers that are not finite", "the weights are damaged, or its training diverged")
    return F.normalize(features, dim=-1)


def class_names(test: Features, *others: Features) -> tuple[str, ...]:
    """Names of the classes by label: the source's own, else their numbers. Sources that disagree are refused."""
    for other in others:
        if test.classes and other.classes and test.classes != other.classes:
            raise UserError(f"{test.name!r} and {other.name!r} have different classes", "use splits of the same data")
    named = next((f.classes for f in (test, *others) if f.classes), ())
    count = 1 + int(max(f.labels.max(initial=-1) for f in (test, *others)))
    return named if len(named) >= count else tuple(str(c) for c in range(count))


def name_of(subject: Any) -> str:
    """How a result calls its subject."""
    return getattr(subject, "id", "") or type(subject.system).__name__
