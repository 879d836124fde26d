"""What every photo index does, whatever stores it: keep up with folders of pictures, forget, find the nearest.

`PhotoIndex.update(photos, pipeline, *, batch_size=64, workers=4, progress=None) -> Update`, `.remove(paths) -> int`,
`.search(vectors [D] | [Q,D], k) -> list[Found] | list[list[Found]]`, `.paths()`, `len()`. `app.index.Index` keeps it in one folder (FAISS and
SQLite), `app.milvus.MilvusIndex` in a Milvus database.
"""
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from polysense.app.files import Progress, ahead, digest, find_photos, readable
from polysense.base.errors import UserError


class Row(NamedTuple):
    """One file as the index knows it; `reason` is empty, or says why the file could not be read (then it has no vector)."""
    path: str
    size: int
    mtime: int
    sha: bytes
    reason: str = ""


@dataclass(frozen=True)
class Found:
    """A picture and its cosine with the query."""
    path: str
    score: float

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "score": self.score}


@dataclass
class Update:
    """What an update did, in pictures. `added` and `changed` were encoded, or took the vector of an identical picture (`copied` of them)."""
    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    copied: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"added": self.added, "changed": self.changed, "removed": self.removed, "unchanged": self.unchanged, "copied": self.copied,
                "skipped": [{"path": p, "reason": r} for p, r in self.skipped]}


class PhotoIndex(ABC):
    """The rules of an index over six operations of a store. `digest` names the model whose features it holds, `dim` is their width.

    Pictures below `base` are stored by relative path, so that a folder and the index inside it can be moved together.
    """

    digest: str
    model: str
    dim: int
    base: Path

    # -- what a store provides ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def known(self) -> dict[str, Row]:
        """Every stored row by its key, skipped files included."""

    @abstractmethod
    def vector_of(self, sha: bytes) -> np.ndarray | None:
        """The vector [D] of any picture with this content."""

    @abstractmethod
    def put(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        """Insert or replace rows by key, all of them or none; `vectors` [N,D] for rows without a reason, anything for the others."""

    @abstractmethod
    def drop(self, keys: Sequence[str]) -> None:
        """Forget these rows."""

    @abstractmethod
    def nearest(self, vectors: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
        """Keys and cosines of the k pictures nearest to each of [Q,D] unit vectors, best first."""

    @abstractmethod
    def begin(self) -> None:
        """Become the one writer, or raise UserError where somebody else is."""

    @abstractmethod
    def end(self) -> None:
        """Stop being the writer; make searching fast again."""

    def own_files(self) -> list[Path]:
        """Folders of the store itself, where no photos are looked for."""
        return []

    # -- what every index does ----------------------------------------------------------------------------------------------------------

    def key(self, path: str | Path) -> str:
        whole = os.path.abspath(path)
        try:
            inside = os.path.commonpath([whole, self.base]) == str(self.base)
        except ValueError:                           # another drive
            inside = False
        return Path(os.path.relpath(whole, self.base)).as_posix() if inside else whole

    def path(self, key: str) -> str:
        return os.path.normpath(os.path.join(self.base, key))

    def __len__(self) -> int:
        return sum(not row.reason for row in self.known().values())

    def paths(self) -> list[str]:
        """The pictures that can be found, sorted."""
        return sorted(self.path(k) for k, row in self.known().items() if not row.reason)

    def skipped(self) -> list[tuple[str, str]]:
        """The pictures that could not be read, with reasons; they are tried again when they change."""
        return sorted((self.path(k), row.reason) for k, row in self.known().items() if row.reason)

    def check(self, pipeline: Any) -> None:
        """Refuse a pipeline whose features cannot be compared with those stored here."""
        if pipeline.digest != self.digest:
            made = f" of {self.model!r}" if self.model else ""
            raise UserError(f"this index was made with model {self.digest}{made}, not with {pipeline.digest} of {pipeline.source or pipeline.id!r}",
                            "search with the model that made it, or index the pictures anew into another folder")

    def update(self, photos: str | Path, pipeline: Any, *, batch_size: int = 64, workers: int = 4, progress: Progress | None = None) -> Update:
        """Bring the index up to date with a folder: new and changed pictures are encoded, vanished ones forgotten, damaged ones skipped and told.

        A file is taken as unchanged while its size and time stand; else its content decides, so a touched or moved picture is not encoded again.
        Interrupted at any moment, the next update goes on after the last batch written. `progress(done, total)` counts files looked at.
        """
        self.check(pipeline)
        self.begin()
        try:
            return self._update(os.path.realpath(photos), pipeline, batch_size, workers, progress)
        finally:
            self.end()

    def _update(self, photos: str, pipeline: Any, batch_size: int, workers: int, progress: Progress | None) -> Update:
        told, rows = Update(), self.known()
        here = {self.key(p): Row(self.key(p), size, mtime, b"") for p, size, mtime in find_photos(photos, self.own_files())}
        gone = [k for k in rows if k not in here and os.path.join(self.path(k), "").startswith(os.path.join(photos, ""))]
        self.drop(gone)
        told.removed = sum(not rows[k].reason for k in gone)
        # a file that could not even be opened has no content name: it is tried every time, as a change of permission moves no clock
        work = [row for k, row in here.items() if k not in rows or rows[k][1:3] != row[1:3] or not rows[k].sha]
        idle = [rows[k] for k in here.keys() - {row.path for row in work}]
        told.unchanged, told.skipped = sum(not r.reason for r in idle), [(self.path(r.path), r.reason) for r in idle if r.reason]
        total, done = len(here), len(idle)
        if progress:
            progress(done, total)
        for batch in self._encoded(work, pipeline, batch_size, workers):
            self.put([row for row, _, _ in batch], np.stack([v for _, v, _ in batch]))
            for row, _, copied in batch:
                old = rows.get(row.path)
                if row.reason:
                    told.skipped.append((self.path(row.path), row.reason))
                    told.removed += bool(old and not old.reason)
                elif old and old.sha == row.sha:
                    told.unchanged += 1
                else:
                    told.copied += copied
                    told.changed += bool(old and not old.reason)
                    told.added += not (old and not old.reason)
            done += len(batch)
            if progress:
                progress(done, total)
        told.skipped.sort()
        return told

    def _encoded(self, work: list[Row], pipeline: Any, batch_size: int, workers: int) -> Iterator[list[tuple[Row, np.ndarray, bool]]]:
        """Batches of (row with content name or reason, vector, whether it was copied); threads hash and decode ahead of the encoder."""
        none = np.zeros(self.dim, np.float32)

        def look(row: Row) -> tuple[Row, np.ndarray | torch.Tensor]:
            path = self.path(row.path)
            try:
                row = row._replace(sha=digest(path))
            except OSError as error:
                return row._replace(reason=f"cannot be opened ({error.strerror})"), none
            if (vector := self.vector_of(row.sha)) is not None:
                return row, vector
            seen = readable(pipeline, path)
            return (row._replace(reason=seen), none) if isinstance(seen, str) else (row, seen)

        looked = (found for _, found in ahead(look, work, workers=workers, depth=2 * batch_size))
        while batch := list(islice(looked, batch_size)):
            fresh = [seen for _, seen in batch if isinstance(seen, torch.Tensor)]
            vectors = iter(pipeline.encode_prepared(torch.stack(fresh)) if fresh else ())
            yield [(row, next(vectors), False) if isinstance(seen, torch.Tensor) else (row, seen, not row.reason) for row, seen in batch]

    def remove(self, paths: Iterable[str | Path]) -> int:
        """Forget pictures (a folder: all below it); how many were known. An update of their folder brings those that still exist back."""
        rows, gone = self.known(), set()
        for path in paths:
            for key in {self.key(path), self.key(os.path.realpath(path))}:
                gone |= {k for k in rows if k == key or key == "." or k.startswith(key + "/")}
        self.begin()
        try:
            self.drop(sorted(gone))
        finally:
            self.end()
        return sum(not rows[k].reason for k in gone)

    def search(self, vectors: np.ndarray, k: int = 10) -> list[Any]:
        """The k pictures (all, if fewer) nearest to unit vectors: [D] -> list[Found], [Q,D] -> a list for each query. Best first."""
        v = np.ascontiguousarray(np.atleast_2d(vectors), np.float32)
        if k < 1:
            raise UserError(f"cannot find {k} pictures", "ask for at least one")
        if v.ndim != 2 or v.shape[1] != self.dim:
            raise UserError(f"the query has shape {list(np.shape(vectors))}", f"this index holds vectors of width {self.dim}")
        found = [[Found(self.path(key), float(score)) for key, score in row] for row in self.nearest(v, k)]
        return found if np.ndim(vectors) == 2 else found[0]
