"""A photo index in one folder: SQLite is the truth, FAISS makes it fast.

`open_index(folder, pipeline=None, photos=None) -> Index` (opens, or creates with a pipeline), `Index.create(folder, digest, dim, model="")`,
`Index.open(folder)`; then `update remove search paths skipped close` as in `app.photos`.

Why it survives SIGKILL at any moment: rows and vectors enter `photos.sqlite` in one transaction a batch (write-ahead log, synchronous), and an id is
never used twice, so a vector never changes under its id. `vectors.faiss` is only a snapshot of them: written beside and renamed, checked by a
digest when read, and brought up to date by comparing ids; a damaged or missing one is made anew from SQLite.

Up to `EXACT` pictures every vector is compared (inner product); above, an inverted file with about 4 sqrt(N) cells is trained and the nearest
sixteenth of the cells is searched (Jégou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011, section 4: the coarse quantiser).
"""
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import faiss
import numpy as np
from filelock import FileLock, Timeout

from polysense.app.files import place
from polysense.app.photos import PhotoIndex, Row
from polysense.base.errors import UserError

FORMAT = "1"
EXACT = 200_000
NAME = ".polysense-index"                            # where the index of a folder of photos lives unless told otherwise
TABLES = """
create table info(name text primary key, value text not null);
create table photos(id integer primary key autoincrement, path blob unique not null, size integer not null, mtime integer not null,
                    sha blob not null, reason text not null, vector blob);
create index by_content on photos(sha);
"""


class Index(PhotoIndex):
    """One folder, one writer, any number of readers (which notice what the writer did at their next search)."""

    def __init__(self, folder: str | Path, *, exact: int = EXACT):
        self.folder: Path = Path(os.path.abspath(folder))
        self.base, self.exact = Path(os.path.realpath(self.folder.parent)), exact
        file = self.folder / "photos.sqlite"
        if not file.is_file():
            raise UserError(f"no index in {str(folder)!r}", "make one with: polysense index PHOTOS -m RUN")
        writable = os.access(self.folder, os.W_OK)
        self.db = sqlite3.connect(f"{file.as_uri()}{'' if writable else '?mode=ro&immutable=1'}", uri=True, isolation_level=None,
                                  timeout=30, check_same_thread=False)
        self.turn = RLock()
        self.lock = FileLock(self.folder / "writer.lock", timeout=0)
        with self._told():
            if writable:
                self.db.execute("pragma journal_mode = wal")
                self.db.execute("pragma synchronous = full")
            info = dict(self.db.execute("select name, value from info").fetchall())
            self.digest, self.model, self.dim, self.birth = info["digest"], info["model"], int(info["dim"]), info["birth"]
            if info["format"] != FORMAT:
                raise UserError(f"the index in {str(folder)!r} has format {info['format']}, this version reads {FORMAT}", self._rebuild())
        self.faiss: Any = None
        self.version = -1, -1

    @classmethod
    def create(cls, folder: str | Path, digest: str, dim: int, *, model: str = "", exact: int = EXACT) -> "Index":
        """An empty index for features of width `dim` of the model named by `digest`; UserError where there is one already."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "writer.lock", timeout=30), place(folder / "photos.sqlite") as file:
                if (folder / "photos.sqlite").exists():
                    raise UserError(f"there is an index in {str(folder)!r} already", "open it, or give another folder")
                db = sqlite3.connect(file, isolation_level=None)
                db.executescript(TABLES)
                db.executemany("insert into info values(?, ?)", {"format": FORMAT, "digest": digest, "dim": str(dim), "model": model,
                                                                 "birth": os.urandom(8).hex()}.items())
                db.close()
        except Timeout:
            raise UserError(f"another process is writing {str(folder)!r}", "wait until it has finished") from None
        except OSError as error:
            raise UserError(f"cannot write an index into {str(folder)!r} ({error.strerror})", "give a folder you may write to with --out") from error
        return cls(folder, exact=exact)

    @classmethod
    def open(cls, folder: str | Path, *, exact: int = EXACT) -> "Index":
        """The index in a folder; UserError where there is none, or a damaged one."""
        return cls(folder, exact=exact)

    def close(self) -> None:
        self.end()
        self.db.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rebuild(self) -> str:
        return f"delete the folder {str(self.folder)!r} and index the pictures again"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """One thread at a time; SQLite's complaints as one line that says what to do."""
        try:
            with self.turn:
                yield
        except (sqlite3.DatabaseError, KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            busy = isinstance(error, sqlite3.OperationalError) and any(w in str(error) for w in ("locked", "full", "readonly", "unable to open"))
            raise UserError(f"the index in {str(self.folder)!r} {'cannot be used now' if busy else 'is damaged'} ({error})",
                            "check free space and permissions, then try again" if busy else self._rebuild()) from error

    # -- the store ----------------------------------------------------------------------------------------------------------------------

    def own_files(self) -> list[Path]:
        return [self.folder]

    def known(self) -> dict[str, Row]:
        with self._told():
            return {os.fsdecode(p): Row(os.fsdecode(p), *rest) for p, *rest in self.db.execute("select path, size, mtime, sha, reason from photos")}

    def __len__(self) -> int:
        with self._told():
            return self.db.execute("select count(*) from photos where vector is not null").fetchone()[0]

    def vector_of(self, sha: bytes) -> np.ndarray | None:
        with self._told():
            row = self.db.execute("select vector from photos where sha = ? and vector is not null limit 1", (sha,)).fetchone()
        return None if row is None else np.frombuffer(row[0], "<f4")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._told():
            self.db.execute("begin immediate")
            try:
                yield
            except BaseException:
                self.db.execute("rollback")
                raise
            self.db.execute("commit")

    def put(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        plain = np.ascontiguousarray(vectors, "<f4")
        with self._transaction():
            self.db.executemany("delete from photos where path = ?", [(os.fsencode(r.path),) for r in rows])
            self.db.executemany("insert into photos(path, size, mtime, sha, reason, vector) values(?, ?, ?, ?, ?, ?)",
                                [(os.fsencode(r.path), r.size, r.mtime, r.sha, r.reason, None if r.reason else v.tobytes())
                                 for r, v in zip(rows, plain, strict=True)])

    def drop(self, keys: Sequence[str]) -> None:
        if keys:
            with self._transaction():
                self.db.executemany("delete from photos where path = ?", [(os.fsencode(k),) for k in keys])

    def begin(self) -> None:
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"the folder {str(self.folder)!r} is read-only", "copy the index to a place you may write to")
        try:
            self.lock.acquire()
        except Timeout:
            raise UserError(f"another process is writing the index in {str(self.folder)!r}",
                            "wait until it has finished; searching is possible meanwhile") from None
        for left in self.folder.glob(".*.part*"):     # by a writer that was killed
            left.unlink(missing_ok=True)

    def end(self) -> None:
        if self.lock.is_locked:
            try:
                self._fresh()
                self._save()
            finally:
                self.lock.release()

    # -- the fast copy ------------------------------------------------------------------------------------------------------------------

    def nearest(self, vectors: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
        with self._told():
            index = self._fresh()
            if not index.ntotal:
                return [[] for _ in vectors]
            scores, ids = index.search(vectors, min(k, index.ntotal))
            wanted = sorted({int(i) for i in ids.ravel() if i >= 0})
            path = {i: os.fsdecode(p) for start in range(0, len(wanted), 500) for i, p in self.db.execute(
                f"select id, path from photos where id in ({','.join(map(str, wanted[start:start + 500]))})")}
        return [[(path[int(i)], float(s)) for i, s in zip(row, score, strict=True) if int(i) in path] for row, score in zip(ids, scores, strict=True)]

    def _fresh(self) -> Any:
        """The FAISS index, holding exactly the ids that SQLite holds."""
        with self._told():
            version = self.db.execute("pragma data_version").fetchone()[0], self.db.total_changes
            if self.faiss is not None and version == self.version:
                return self.faiss
            index = self._load() if self.faiss is None else self.faiss
            want = np.array([i for i, in self.db.execute("select id from photos where vector is not null order by id")], np.int64)
            if index is not None and not self._fits(index, len(want)):
                index = None
            have = np.empty(0, np.int64) if index is None else _ids(index)
            if index is not None and len(gone := np.setdiff1d(have, want, assume_unique=True)):
                index.remove_ids(gone)
            new = np.setdiff1d(want, have, assume_unique=True)
            if index is None:
                index = self._build(new)
            for part in np.array_split(new, max(1, len(new) // 10_000)):
                if len(part):
                    index.add_with_ids(self._vectors(part), part)
            self.faiss, self.version = index, version
            return index

    def _vectors(self, ids: np.ndarray) -> np.ndarray:
        """[N,D] of ascending ids."""
        rows = self.db.execute("select id, vector from photos where id between ? and ? and vector is not null order by id",
                               (int(ids[0]), int(ids[-1])))
        wanted = set(ids.tolist())
        found = b"".join(v for i, v in rows if i in wanted)
        if len(found) != 4 * self.dim * len(ids):
            raise UserError(f"the index in {str(self.folder)!r} is damaged (vectors of wrong length)", self._rebuild())
        return np.frombuffer(found, "<f4").reshape(len(ids), self.dim)

    def _fits(self, index: Any, count: int) -> bool:
        """Whether an index is of the right kind for so many vectors, and its cells not far too few."""
        if isinstance(index, faiss.IndexIDMap2):
            return count <= self.exact
        return count > self.exact and index.nlist >= count ** 0.5

    def _build(self, ids: np.ndarray) -> Any:
        if len(ids) <= self.exact:
            return faiss.IndexIDMap2(faiss.IndexFlatIP(self.dim))
        cells = int(4 * len(ids) ** 0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, cells, faiss.METRIC_INNER_PRODUCT)
        sample = np.sort(np.random.default_rng(0).choice(ids, min(len(ids), 64 * cells), replace=False))
        index.train(np.concatenate([self._vectors(p) for p in np.array_split(sample, max(1, len(sample) // 10_000))]))
        index.nprobe = max(8, cells // 16)
        return index

    def _save(self) -> None:
        payload = faiss.serialize_index(self.faiss).tobytes()
        head = f"{self.birth} {hashlib.blake2b(payload, digest_size=16).hexdigest()}\n".encode()
        with place(self.folder / "vectors.faiss") as file:
            file.write_bytes(head + payload)

    def _load(self) -> Any:
        """The snapshot, or None where it is missing, damaged, or of another index."""
        try:
            head, _, payload = (self.folder / "vectors.faiss").read_bytes().partition(b"\n")
            birth, said = head.decode().split()
        except (OSError, ValueError):
            return None
        if birth != self.birth or said != hashlib.blake2b(payload, digest_size=16).hexdigest():
            return None
        index = faiss.downcast_index(faiss.deserialize_index(np.frombuffer(payload, np.uint8)))
        return index if index.d == self.dim else None


def _ids(index: Any) -> np.ndarray:
    """The ids that a FAISS index holds."""
    if isinstance(index, faiss.IndexIDMap2):
        return faiss.vector_to_array(index.id_map)
    lists = index.invlists
    parts = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy() for i in range(index.nlist) if lists.list_size(i)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def open_index(folder: str | Path, pipeline: Any = None) -> Index:
    """The index in `folder`; with a pipeline it is checked against it, and created where there is none."""
    if pipeline is not None and not (Path(folder) / "photos.sqlite").exists():
        return Index.create(folder, pipeline.digest, pipeline.dim, model=pipeline.source)
    index = Index.open(folder)
    if pipeline is not None:
        index.check(pipeline)
    return index
