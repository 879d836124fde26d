"""What a source of samples is, and how sources combine.

A sample is a dict: `id` str, `image` PIL picture or uint8 array [H,W,3], `captions` list[str], `rewrites` (captions in other words) list[str],
`label` int, `tags` list[int],
`boxes` float32 [N,4] (x0 y0 x1 y1 in [0,1]), `box_label` int [N], `mask` bool [N,H,W], `question` and `answer` str (or `qa`, a list of
such pairs), `audio` float32 [S] in [-1,1], `video` uint8 [T,H,W,3], `edited` and `hint` pictures, `depth` float [H,W].
"""
from __future__ import annotations

import hashlib
import os
import tarfile
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError

Sample = dict[str, Any]
HEAVY = ("image", "edited", "hint", "depth", "mask", "audio", "video")     # what costs decoding, hence is loaded on demand
FOLLOWS = {"image": ("views",), "mask": ("polygon",), "text": ("text_mask",), "video": ("video_mask",)}     # batch keys that come with another


class BadSample(Exception):
    """One sample that cannot be read. `.id` names it, `.reason` says why; loaders skip, count and report it."""

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class BadPicture(UserError):
    """Bytes, a file or an address that does not hold a picture."""


def offered(keys: Iterable[str]) -> tuple[str, ...]:
    """Batch keys that can be made of samples with these keys: `image` gives `views`, `text` gives `text_mask`, all give `index`."""
    out = dict.fromkeys(("index", *keys))
    for key in tuple(out):
        out |= dict.fromkeys(FOLLOWS.get(key, ()))
    return tuple(out)


class Source(ABC):
    """Samples by position. Subclasses give `id`, `_about` (captions, labels: cheap) and `_load` (pictures, sound: decoded on demand).

    `offers`: the batch keys that every sample can fill. `classes`: names by label; `tag_names`: names by tag. `largest`: an upper
    bound of the longer side of the pictures in pixels, where known. `rate`: audio samples a second. `notes`: damage found on
    opening, as (name, reason) pairs.
    """
    name = ""
    split = "train"
    offers: tuple[str, ...] = ("index",)
    classes: tuple[str, ...] = ()
    tag_names: tuple[str, ...] = ()
    largest: int | None = None
    rate: int | None = None
    notes: Sequence[tuple[str, str]] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def id(self, i: int) -> str:
        """The stable name of sample i."""

    @abstractmethod
    def _about(self, i: int) -> Sample: ...

    def _load(self, i: int, key: str) -> Any:
        raise KeyError(key)

    def heavy(self, i: int) -> tuple[str, ...]:
        """Which decoded keys sample i has."""
        return tuple(k for k in HEAVY if k in self.offers)

    def about(self, i: int) -> Sample:
        """Everything cheap about sample i: `id`, captions, labels, boxes. Raises BadSample."""
        return {"id": self.id(i), **self._guard(i, lambda: self._about(i))}

    def load(self, i: int, key: str) -> Any:
        """One decoded key of sample i, for instance "image". Raises BadSample."""
        return self._guard(i, lambda: self._load(i, key))

    def _guard(self, i: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except BadPicture as error:
            raise BadSample(self.id(i), error.advice or error.what) from error
        except (BadSample, UserError, MemoryError):
            raise
        except Exception as error:  # decoders raise anything on damaged bytes; the reason is kept and reported
            raise BadSample(self.id(i), f"{type(error).__name__}: {error}") from error

    def kinds(self) -> list[int] | None:
        """A number for each sample where some have no picture: training then makes every batch of samples of one kind. None: all alike."""
        return None

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return self.about(i) | {k: self.load(i, k) for k in self.heavy(i)}

    def only(self, keys: Iterable[str]) -> Source:
        """The same samples for somebody who wants these batch keys alone: what nobody asks for need not be worked out."""
        return self

    def captions(self) -> Iterator[str]:
        """All captions, no picture decoded: what a tokeniser is trained on. Unreadable samples are left out."""
        for i in range(len(self)):
            try:
                yield from self.about(i).get("captions", ())
            except BadSample:
                continue

    def labels(self) -> list[int]:
        """The label of every sample (-1: none), no picture decoded."""
        return [int(self.about(i).get("label", -1)) for i in range(len(self))]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.split}: {len(self)} samples, offers {' '.join(self.offers)}>"


class ListSource(Source):
    """Samples held in memory; the pictures may also be paths, encoded bytes or addresses."""

    def __init__(self, name: str, samples: Sequence[Sample], offers: Iterable[str], *, split: str = "train", classes: Sequence[str] = (),
                 tag_names: Sequence[str] = (), largest: int | None = None, rate: int | None = None):
        self.name, self.samples, self.split, self.offers = name, samples, split, offered(offers)
        self.classes, self.tag_names, self.largest, self.rate = tuple(classes), tuple(tag_names), largest, rate

    def __len__(self) -> int:
        return len(self.samples)

    def id(self, i: int) -> str:
        return str(self.samples[i].get("id", i))

    def _about(self, i: int) -> Sample:
        return {k: v for k, v in self.samples[i].items() if k not in HEAVY and k != "id"}

    def heavy(self, i: int) -> tuple[str, ...]:
        return tuple(k for k in HEAVY if k in self.samples[i])

    def _load(self, i: int, key: str) -> Any:
        from polysense.data.images import decode

        thing = self.samples[i][key]
        return decode(thing) if key in ("image", "edited", "hint") else thing


class Subset(Source):
    """Chosen positions of another source."""

    def __init__(self, base: Source, rows: Sequence[int], split: str | None = None):
        self.base, self.rows = base, [int(i) for i in rows]
        self.name, self.split, self.offers, self.classes = base.name, split or base.split, base.offers, base.classes
        self.tag_names, self.largest, self.rate, self.notes = base.tag_names, base.largest, base.rate, base.notes

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, i: int) -> str:
        return self.base.id(self.rows[i])

    def kinds(self) -> list[int] | None:
        kinds = self.base.kinds()
        return None if kinds is None else [kinds[i] for i in self.rows]

    def heavy(self, i: int) -> tuple[str, ...]:
        return self.base.heavy(self.rows[i])

    def only(self, keys: Iterable[str]) -> Source:
        return Subset(self.base.only(keys), self.rows, self.split) if type(self) is Subset else self

    def _about(self, i: int) -> Sample:
        return self.base.about(self.rows[i])

    def _load(self, i: int, key: str) -> Any:
        return self.base.load(self.rows[i], key)


class ConcatSource(Source):
    """Sources one after the other. Offers what all of them offer; ids get their source's name in front; labels are renumbered by name."""

    def __init__(self, sources: Sequence[Any]):
        if not sources:
            raise UserError("no sources to join", "name at least one")
        self.sources = list(sources)
        self.name, self.split = "+".join(s.name for s in sources), sources[0].split
        self.offers = tuple(k for k in sources[0].offers if all(k in s.offers for s in sources))
        self.classes, self._label_of = _merged(s.classes for s in sources)
        self.tag_names, self._tag_of = _merged(getattr(s, "tag_names", ()) for s in sources)
        sizes = [getattr(s, "largest", None) for s in sources]
        self.largest = None if None in sizes else max(s for s in sizes if s is not None)
        rates = {getattr(s, "rate", None) for s in sources}
        if "audio" in self.offers and len(rates) > 1:
            raise UserError(f"{self.name} joins sounds of {sorted(map(str, rates))} samples a second", "join sources of one rate")
        self.rate = rates.pop() if len(rates) == 1 else None
        self.notes = [(f"{s.name}/{name}", why) for s in sources for name, why in getattr(s, "notes", ())]
        self._ends = [sum(len(s) for s in sources[:k + 1]) for k in range(len(sources))]

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, i: int) -> tuple[int, int]:
        from bisect import bisect_right

        k = bisect_right(self._ends, i)
        return k, i - (self._ends[k - 1] if k else 0)

    def id(self, i: int) -> str:
        k, j = self._at(i)
        return f"{self.sources[k].name}/{name_of(self.sources[k], j)}"

    def kinds(self) -> list[int] | None:
        each = [s.kinds() if isinstance(s, Source) else None for s in self.sources]
        return None if all(k is None for k in each) else [n for s, k in zip(self.sources, each) for n in (k or [0] * len(s))]

    def heavy(self, i: int) -> tuple[str, ...]:
        k, _ = self._at(i)
        return tuple(key for key in HEAVY if key in self.sources[k].offers and key in self.offers)

    def _about(self, i: int) -> Sample:
        k, j = self._at(i)
        s = self.sources[k]
        about = dict(s.about(j)) if isinstance(s, Source) else {key: v for key, v in s[j].items() if key not in HEAVY}
        about.pop("id", None)
        if about.get("label", -1) >= 0 and self._label_of[k]:
            about["label"] = self._label_of[k][about["label"]]
        if "tags" in about and self._tag_of[k]:
            about["tags"] = [self._tag_of[k][t] for t in about["tags"]]
        return about

    def _load(self, i: int, key: str) -> Any:
        k, j = self._at(i)
        s = self.sources[k]
        return s.load(j, key) if isinstance(s, Source) else s[j][key]


def _merged(names: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], list[list[int]]]:
    lists = [tuple(n) for n in names]
    union = {name: i for i, name in enumerate(dict.fromkeys(name for n in lists for name in n))}
    return tuple(union), [[union[name] for name in n] for n in lists]


def name_of(source: Any, i: int) -> str:
    """The id of sample i of any source, also of one that only has `__getitem__`."""
    if hasattr(source, "id"):
        return source.id(i)
    return str(source[i].get("id", i))


def held_out(source: Source, split: str, share: float = 0.1) -> Source:
    """The part of a source without splits of its own that is called `split`.

    "val" (also "dev", "test") is a fixed tenth, chosen by a hash of each sample's id, so that it stays the same when files are
    added or reordered; "train" is the rest; "all" is everything.
    """
    if split == "all" or (split == "train" and len(source) < 2):
        return source
    if split not in ("train", "val", "dev", "test"):
        raise UserError(f"{source.name} has no split {split!r}", 'it has "train", "val" (a fixed tenth held out) and "all"')
    place = [int.from_bytes(hashlib.sha256(source.id(i).encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
             for i in range(len(source))]
    out = {i for i, p in enumerate(place) if p < share} or {min(range(len(place)), key=lambda i: place[i])}
    rows = [i for i in range(len(source)) if (i in out) == (split != "train")]
    return Subset(source, rows, "train" if split == "train" else "val")


def unpacked(path: str) -> tuple[bytes, str]:
    """The content of a .gz as far as it can be read, and what is wrong with the rest ("" if nothing is)."""
    parts, why = [], ""
    with open(path, "rb") as file:
        engine = zlib.decompressobj(31)
        while packed := file.read(1 << 20):
            while packed and not why:
                try:
                    parts.append(engine.decompress(packed))
                except zlib.error as error:
                    why = f"the archive breaks off ({error})"
                packed = engine.unused_data
                if engine.eof:                           # another member may follow
                    engine = zlib.decompressobj(31) if packed else engine
                else:
                    packed = b""
    return b"".join(parts), why or ("" if engine.eof else "the archive breaks off")


class Blob:
    """Random access to one file, safe in threads and after fork; a .gz is unpacked once into memory."""

    def __init__(self, path: str | Path):
        self.path, self.damage = str(path), ""
        self._fd: tuple[int, int] | None = None
        self._bytes: bytes | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "damage": self.damage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def whole(self) -> bytes | None:
        """The unpacked bytes of a .gz (as far as they can be read), None for a plain file."""
        if not self.path.endswith(".gz") and not self.path.endswith(".tgz"):
            return None
        with self._lock:
            if self._bytes is None:
                self._bytes, self.damage = unpacked(self.path)
        return self._bytes

    def read(self, offset: int, size: int) -> bytes:
        whole = self.whole()
        if whole is not None:
            got = whole[offset:offset + size]
        else:
            with self._lock:
                if self._fd is None or self._fd[0] != os.getpid():
                    self._fd = (os.getpid(), os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
            got = os.pread(self._fd[1], size, offset)
        if len(got) < size:
            raise OSError("the archive breaks off inside this file")
        return got

    def __del__(self, mine: Callable[[], int] = os.getpid, close: Callable[[int], None] = os.close) -> None:
        if self._fd is not None and self._fd[0] == mine():      # as defaults, for modules may be gone by then
            close(self._fd[1])

    def members(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of every file in a tar; stops where the archive breaks and says so in `damage`."""
        whole = self.whole()
        try:
            with tarfile.open(self.path, "r:") if whole is None else tarfile.open(fileobj=BytesIO(whole), mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        yield member.name, member.offset_data, member.size
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = self.damage or f"the archive cannot be read on ({error})"
