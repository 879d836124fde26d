"""WebDataset tars read as a stream: from addresses, or from disks too slow or full for an index."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

from polysense.base.errors import UserError
from polysense.data.readers import PICTURES, Record
from polysense.data.sources import BadSample, Sample
from polysense.data.user import annotate, offers_of_samples

SHUFFLE = 1000                                          # samples in the shuffle buffer
PROBE = 16                                              # samples looked at to see what the tars offer


class _Bytes(Record):
    """A sample whose files are in memory already."""

    def __init__(self, key: str, files: dict[str, bytes]):
        self.key, self.files = key, files
        self.parts = dict.fromkeys(files)  # type: ignore[assignment]

    def bytes(self, *endings: str) -> bytes:
        for e in endings:
            if e in self.files:
                return self.files[e]
        raise BadSample(self.key, f"has no .{endings[0]} (it has {', '.join(self.files) or 'nothing'})")


class StreamSource:
    """Samples in the order of their shards; no length and no positions.

    In training an epoch takes the shards in an order seeded by (seed, epoch) and mixes samples in a seeded buffer. Ranks get whole
    shards in turn where there are enough of them, else every world-th sample. A shard that breaks off or cannot be fetched costs the
    rest of that shard and is listed in `notes`.
    """
    classes: tuple[str, ...] = ()
    tag_names: tuple[str, ...] = ()
    largest: int | None = None
    rate: int | None = None

    def __init__(self, name: str, urls: Sequence[str], *, split: str = "train"):
        self.name, self.urls, self.split = name, list(urls), split
        self.notes: list[tuple[str, str]] = []
        probe = [_record(s) for s in islice(self._raw(self.urls), PROBE)]
        if not probe:
            raise UserError(f"{name} holds no samples", "; ".join(f"{n}: {why}" for n, why in self.notes) or "check the address of its tars")
        good = [(r, a) for r, a in ((r, _try(r)) for r in probe) if a is not None]
        self.offers = offers_of_samples([a for _, a in good], [set(r.parts) for r, _ in good])

    def samples(self, seed: int, epoch: int, train: bool, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """Undecoded samples of one epoch, for one rank."""
        rng = np.random.default_rng([seed, epoch, 2])
        order = [self.urls[k] for k in rng.permutation(len(self.urls))] if train else self.urls
        raw = self._raw(order[rank::world]) if len(order) >= world else islice(self._raw(order), rank, None, world)
        if not train:
            yield from raw
            return
        rng, held = np.random.default_rng([seed, epoch, rank, 3]), []
        for sample in raw:
            if len(held) < SHUFFLE:
                held.append(sample)
                continue
            k = int(rng.integers(SHUFFLE))
            held[k], sample = sample, held[k]
            yield sample
        yield from (held[k] for k in rng.permutation(len(held)))

    def captions(self) -> Iterator[str]:
        """All captions of one pass over the tars, no picture decoded: what a tokeniser is trained on."""
        for sample in self._raw(self.urls):
            about = _try(_record(sample))
            yield from (about or {}).get("captions", ())

    def about(self, raw: dict[str, Any]) -> Sample:
        """Captions, label and id of an undecoded sample. Raises BadSample."""
        record = _record(raw)
        try:
            return {"id": record.key, **annotate(record)}
        except ValueError as error:
            raise BadSample(record.key, f"{type(error).__name__}: {error}") from error

    def load(self, raw: dict[str, Any], key: str) -> Any:
        """The picture of an undecoded sample. Raises BadSample."""
        from polysense.data.images import decode
        from polysense.data.sources import BadPicture

        record = _record(raw)
        if key != "image":
            raise BadSample(record.key, f"has no {key}")
        try:
            return decode(record.bytes(*PICTURES))
        except BadPicture as error:
            raise BadSample(record.key, error.advice or error.what) from error

    def _raw(self, urls: Iterable[str]) -> Iterator[dict[str, Any]]:
        """webdataset's samples (a dict of bytes by ending) of these shards, one after the other."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for url in urls:
            def note(error: Exception, url: str = url) -> bool:
                entry = (url, f"the shard breaks off ({error.args[0] if error.args else error})")
                if entry[0] not in {n for n, _ in self.notes}:
                    self.notes.append(entry)
                return True

            try:
                stream = urlopen(Request(url, headers={"User-Agent": "polysense"}), timeout=60) if "://" in url else open(url, "rb")  # noqa: SIM115
            except (OSError, ValueError) as error:
                note(error)
                continue
            with closing(stream):
                yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}], handler=note), handler=note)


def _record(raw: dict[str, Any]) -> _Bytes:
    return _Bytes(raw["__key__"], {k: v for k, v in raw.items() if not k.startswith("__")})


def _try(record: Record) -> Sample | None:
    try:
        return annotate(record)
    except (BadSample, ValueError):
        return None
