"""Searching an index otherwise than by one vector a picture.

    sparse   an inverted index of terms: the sum, over the terms of the query, of their weights in text and picture (STAIR, Chen et al. 2023)
    late     each word of the query looks for its best patch; the mean over words (FILIP, Yao et al. 2022). The best by dense are judged again
    fused    reciprocal ranks of dense and of those of the two that the system can do, added: 1 / (60 + rank) (Cormack et al. 2009)

`ranked(index, pipeline, query, k, by=...) -> list[Found]`. What a way needs to know of the pictures lies beside the index in `parts.sqlite`: it is
made when first asked for (or by `prepare_ways`), kept by content, and left out with the pictures. Where the index cannot be written, or is a server,
it lies in the user's cache folder; what a read-only index brings with it is taken over.
"""
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polysense.app.files import Progress, ahead, place, readable
from polysense.app.photos import Found, PhotoIndex
from polysense.base.errors import UserError
from polysense.pipeline.words import encode_terms, encode_words, late_scores, patches_of, plain_token, terms_of_prepared
from polysense.train.starts import cache_root

WAYS = ("dense", "sparse", "late", "fused")
NEEDS = {"dense": (), "fused": (), "sparse": ("encode_image_terms", "encode_text_terms"), "late": ("encode_patches", "encode_words")}
RRF = 60
SHORTLIST = 200                                          # pictures that late interaction judges again
TABLES = """
create table if not exists model(digest text primary key);
create table if not exists pictures(id integer primary key, sha blob unique not null);
create table if not exists done(picture integer, way text, primary key(picture, way)) without rowid;
create table if not exists terms(term integer, picture integer, weight real not null, primary key(term, picture)) without rowid;
create table if not exists patches(picture integer primary key, count integer not null, vectors blob not null);
"""


def able(pipeline: Any, way: str) -> bool:
    return all(pipeline.can(c) for c in NEEDS[way])


def ranked(index: PhotoIndex, pipeline: Any, query: str, k: int, *, by: str = "dense", shortlist: int = SHORTLIST,
           progress: Progress | None = None, parts: "Parts | None" = None) -> list[Found]:
    """The k pictures that fit a text best, by one of WAYS; UserError where the system cannot search so. parts: those of this index, where more is
    asked of them (they stay open, and know the query)."""
    if by not in WAYS:
        raise UserError(f"there is no way {by!r} to search", f"the ways are {', '.join(WAYS)}")
    for capability in NEEDS[by]:
        pipeline._need(capability)
    if by == "dense":
        return index.search(pipeline.encode(texts=[query])[0], k)
    if parts is None:
        with closing(Parts(index, pipeline)) as parts:
            return ranked(index, pipeline, query, k, by=by, shortlist=shortlist, progress=progress, parts=parts)
    if by == "sparse":
        return parts.sparse(query, k, progress)
    if by == "late":
        return parts.late(query, max(k, shortlist), progress)[:k]
    deep = max(k, shortlist)
    lists = [index.search(parts.vector(query), deep)]
    if able(pipeline, "sparse"):
        lists.append(parts.sparse(query, deep, progress))
    if able(pipeline, "late"):
        lists.append(parts.late(query, deep, progress))
    if len(lists) == 1:
        raise UserError(f"{pipeline.id or 'this system'} can only search by dense vectors",
                        "leave --by out, or train a system that gives words and patches, or terms")
    return fuse(lists)[:k]


def fuse(lists: Sequence[Sequence[Found]]) -> list[Found]:
    """Reciprocal rank fusion of several answers, best first."""
    score: dict[str, float] = {}
    for answer in lists:
        for rank, found in enumerate(answer, 1):
            score[found.path] = score.get(found.path, 0.0) + 1 / (RRF + rank)
    return [Found(path, s) for path, s in sorted(score.items(), key=lambda item: -item[1])]


def prepare_ways(index: PhotoIndex, pipeline: Any, progress: Progress | None = None) -> dict[str, int]:
    """Makes what sparse and late search need of all pictures now; {way: pictures that were looked at}."""
    with closing(Parts(index, pipeline)) as parts:
        return {way: parts.complete(way, None, progress) for way in ("sparse", "late") if able(pipeline, way)}


def place_of(index: PhotoIndex, digest: str) -> Path | str:
    """Where the parts of an index lie: in its folder; in the user's cache where that cannot be written, or there is none, by the index and the model,
    begun with what the folder holds; in memory where the cache cannot be written either."""
    folder = next(iter(index.own_files()), None)
    if folder is not None and os.access(folder, os.W_OK):
        return folder / "parts.sqlite"
    whose = getattr(index, "birth", "") or f"{type(index).__name__} {folder} {getattr(index, 'uri', '')} {getattr(index, 'collection', '')}"
    file = cache_root().parent / "parts" / f"{hashlib.blake2b(f'{whose} {digest}'.encode(), digest_size=12).hexdigest()}.sqlite"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            return ":memory:"
        if not file.exists() and folder is not None and (folder / "parts.sqlite").is_file():
            with suppress(OSError), place(file) as beside:
                shutil.copyfile(folder / "parts.sqlite", beside)
    except OSError:
        return ":memory:"
    return file


class Parts:
    """What the ways know of the pictures of one index (see `place_of`), and of the queries that were asked while it is open."""

    def __init__(self, index: PhotoIndex, pipeline: Any):
        file = place_of(index, pipeline.digest)
        self.index, self.pipeline = index, pipeline
        self.places: dict[bytes, list[str]] = {}
        for row in index.known().values():
            if not row.reason:
                self.places.setdefault(row.sha, []).append(index.path(row.path))
        self.content = {path: sha for sha, paths in self.places.items() for path in paths}
        self.said: dict[tuple[str, str], np.ndarray] = {}
        self.db = sqlite3.connect(file, timeout=30, isolation_level=None)
        try:
            self.db.executescript(TABLES)
            made = self.db.execute("select digest from model").fetchone()
            if made != (pipeline.digest,):                       # of another model: nothing here can be compared
                with self.db:
                    self.db.execute("begin immediate")
                    for table in ("model", "pictures", "done", "terms", "patches"):
                        self.db.execute(f"delete from {table}")
                    self.db.execute("insert into model values(?)", (pipeline.digest,))
        except sqlite3.DatabaseError as error:
            self.db.close()
            raise UserError(f"{file} cannot be used ({error})", "delete it: it is made anew") from error

    def close(self) -> None:
        self.db.close()

    # -- making -------------------------------------------------------------------------------------------------------------------------

    def complete(self, way: str, only: Sequence[bytes] | None, progress: Progress | None = None, batch_size: int = 64) -> int:
        """Looks at the pictures (all, or these contents) that `way` has not seen; how many. Interrupted, the next call goes on."""
        self._forget()
        have = {sha for sha, in self.db.execute("select sha from pictures join done on done.picture = pictures.id where way = ?", (way,))}
        wanted = [sha for sha in (self.places if only is None else only) if sha not in have]
        batch = list[tuple[bytes, torch.Tensor]]()
        looked = ahead(lambda sha: readable(self.pipeline, self.places[sha][0]), wanted, depth=2 * batch_size)
        for done, (sha, seen) in enumerate(looked, 1):
            if isinstance(seen, torch.Tensor):
                batch.append((sha, seen))
            if len(batch) == batch_size or done == len(wanted):
                self._put(way, batch)
                batch = []
                if progress:
                    progress(done, len(wanted))
        return len(wanted)

    def _put(self, way: str, batch: list[tuple[bytes, torch.Tensor]]) -> None:
        if not batch:
            return
        pixels = torch.stack([seen for _, seen in batch])
        vectors = terms_of_prepared(self.pipeline, pixels) if way == "sparse" else patches_of(self.pipeline, pixels)
        self.db.execute("begin immediate")
        try:
            for (sha, _), v in zip(batch, vectors, strict=True):
                self.db.execute("insert or ignore into pictures(sha) values(?)", (sha,))
                picture, = self.db.execute("select id from pictures where sha = ?", (sha,)).fetchone()
                self.db.execute("insert or ignore into done values(?, ?)", (picture, way))
                if way == "sparse":
                    at = np.flatnonzero(v > 0)
                    self.db.executemany("insert or replace into terms values(?, ?, ?)",
                                        ((int(t), picture, float(w)) for t, w in zip(at, v[at], strict=True)))
                else:
                    self.db.execute("insert or replace into patches values(?, ?, ?)", (picture, len(v), v.astype("<f2").tobytes()))
        except BaseException:
            self.db.execute("rollback")
            raise
        self.db.execute("commit")

    def _forget(self) -> None:
        """Contents that the index no longer holds."""
        gone = [(i,) for i, sha in self.db.execute("select id, sha from pictures") if sha not in self.places]
        if gone:
            self.db.execute("begin immediate")
            for table, column in (("terms", "picture"), ("patches", "picture"), ("done", "picture"), ("pictures", "id")):
                self.db.executemany(f"delete from {table} where {column} = ?", gone)
            self.db.execute("commit")

    # -- the query, encoded once ------------------------------------------------------------------------------------------------------------

    def vector(self, query: str) -> np.ndarray:
        """[D]"""
        return self._once("vector", query, lambda: self.pipeline.encode(texts=[query])[0])

    def weights(self, query: str) -> np.ndarray:
        """Of its terms, [V]."""
        return self._once("terms", query, lambda: encode_terms(self.pipeline, texts=[query])[0])

    def words(self, query: str) -> np.ndarray:
        """[L,D]"""
        return self._once("words", query, lambda: encode_words(self.pipeline, query))

    def _once(self, what: str, query: str, encode: Callable[[], np.ndarray]) -> np.ndarray:
        if (what, query) not in self.said:
            self.said[what, query] = encode()
        return self.said[what, query]

    # -- asking -------------------------------------------------------------------------------------------------------------------------

    def sparse(self, query: str, k: int, progress: Progress | None = None) -> list[Found]:
        """By the inverted index: only pictures that share a term with the query are found."""
        self.complete("sparse", None, progress)
        return self.by_terms(self.weights(query), k)

    def shared(self, query: str, path: str, top: int = 8) -> tuple[tuple[str, float, float], ...]:
        """What a text and an indexed picture have in common: (token, weight in the text, weight in the picture), largest product first."""
        weights = self.weights(query)
        seen = self.db.execute("select term, weight from terms join pictures on id = picture where sha = ?", (self.content.get(path, b""),))
        met = sorted(((float(weights[t]) * w, t, w) for t, w in seen if weights[t] > 0), reverse=True)[:top]
        return tuple((plain_token(self.pipeline.tokenizer.token(t)), float(weights[t]), float(w)) for _, t, w in met)

    def by_terms(self, weights: np.ndarray, k: int) -> list[Found]:
        """The k pictures with the largest dot product with the weights [V] of a query."""
        at = np.flatnonzero(weights > 0)
        self.db.execute("create temp table if not exists asked(term integer primary key, weight real)")
        self.db.execute("delete from asked")
        self.db.executemany("insert into asked values(?, ?)", ((int(t), float(weights[t])) for t in at))
        rows = self.db.execute("""
            select sha, score from (select picture, sum(asked.weight * terms.weight) as score from asked cross join terms using (term)
                                    group by picture order by score desc limit ?)
            join pictures on id = picture order by score desc""", (k,)).fetchall()
        return [Found(path, float(score)) for sha, score in rows for path in sorted(self.places.get(sha, ()))][:k]

    def late(self, query: str, shortlist: int, progress: Progress | None = None) -> list[Found]:
        """The best `shortlist` by dense, judged again word by word."""
        paths = {f.path for f in self.index.search(self.vector(query), shortlist)}
        chosen = [sha for sha, at in self.places.items() if paths & set(at)]
        self.complete("late", chosen, progress)
        words = self.words(query)
        known = {sha: (count, blob) for sha, count, blob in self._patches(chosen)}
        if not known:
            return []
        found: list[Found] = []
        for count in sorted({c for c, _ in known.values()}):
            same = [sha for sha, (c, _) in known.items() if c == count]
            stack = np.stack([np.frombuffer(known[sha][1], "<f2").reshape(count, -1) for sha in same]).astype(np.float32)
            found += [Found(path, float(s)) for sha, s in zip(same, late_scores(stack, words), strict=True) for path in sorted(self.places[sha])]
        return sorted((f for f in found if f.path in paths), key=lambda f: -f.score)

    def _patches(self, chosen: Sequence[bytes]) -> list[tuple[bytes, int, bytes]]:
        out: list[tuple[bytes, int, bytes]] = []
        for start in range(0, len(chosen), 500):
            part = chosen[start:start + 500]
            out += self.db.execute("select sha, count, vectors from patches join pictures on id = picture "
                                   f"where sha in ({','.join('?' * len(part))})", part)
        return out
