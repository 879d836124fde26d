"""The photo index in a Milvus database, for those who outgrow one machine: the same interface as `app.index.Index`.

`open_milvus(uri, collection, pipeline=None, base=".") -> MilvusIndex`; `uri` is a server (`http://host:19530`) or a local file ending in `.db`
(Milvus Lite, embedded). Needs the extra `milvus`.

The primary key is a digest of the path, so that writing a picture again replaces it. One writer at a time is the user's own care here: Milvus has
no lock to offer; two writers at once cost work twice and nothing else, as every row is replaced whole.
"""
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polysense.app.photos import PhotoIndex, Row
from polysense.base.errors import UserError, need_extra

PAGE = 4096                                          # rows asked for or sent at a time: below Milvus's limits on message size
ABOUT = "about"
FIELDS = ["path", "size", "mtime", "sha", "reason"]


class MilvusIndex(PhotoIndex):
    """A collection with path, size, mtime, content name, reason and vector; skipped files are kept with a zero vector and filtered out."""

    def __init__(self, uri: str, collection: str, pipeline: Any = None, base: str | Path = "."):
        self.milvus = need_extra("pymilvus", "milvus")
        try:
            self.client = self.milvus.MilvusClient(uri)
            exists = self.client.has_collection(collection)
        except Exception as error:                   # the client raises its own, grpc's and OS errors
            raise UserError(f"cannot reach Milvus at {uri!r} ({(str(error) or type(error).__name__).splitlines()[0]})",
                            "is the server running? a local file must end in .db") from error
        self.uri, self.collection, self.base = uri, collection, Path(os.path.realpath(base))
        if not exists:
            if pipeline is None:
                raise UserError(f"Milvus at {uri!r} has no collection {collection!r}", "index some pictures into it first")
            self._create(pipeline)
        self.client.load_collection(collection)
        self.digest, self.model, self.dim = self._about()
        if pipeline is not None:
            self.check(pipeline)

    def _create(self, pipeline: Any) -> None:
        kind = self.milvus.DataType
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", kind.VARCHAR, is_primary=True, max_length=32)
        schema.add_field("path", kind.VARCHAR, max_length=16384)
        schema.add_field("size", kind.INT64)
        schema.add_field("mtime", kind.INT64)
        schema.add_field("sha", kind.VARCHAR, max_length=32)
        schema.add_field("reason", kind.VARCHAR, max_length=4096)
        schema.add_field("vector", kind.FLOAT_VECTOR, dim=pipeline.dim)
        ways = self.client.prepare_index_params()
        ways.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
        self.client.create_collection(self.collection, schema=schema, index_params=ways, consistency_level="Strong")
        # Milvus Lite drops descriptions, so what the index is about stands in a row that no query for pictures finds
        about = json.dumps({"digest": pipeline.digest, "model": pipeline.source, "dim": pipeline.dim})
        self.client.insert(self.collection, [{"id": ABOUT, "path": "", "size": -1, "mtime": 0, "sha": "", "reason": about,
                                              "vector": [0.0] * pipeline.dim}])

    def _about(self) -> tuple[str, str, int]:
        try:
            (row,) = self.client.get(self.collection, ids=[ABOUT], output_fields=["reason"])
            said = json.loads(row["reason"])
            return said["digest"], said["model"], said["dim"]
        except (self.milvus.MilvusException, ValueError, KeyError) as error:
            raise UserError(f"the collection {self.collection!r} was not made by polysense", "give another name") from error

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> "MilvusIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def known(self) -> dict[str, Row]:
        pages = self.client.query_iterator(self.collection, batch_size=PAGE, filter="size >= 0", output_fields=FIELDS)
        out: dict[str, Row] = {}
        while page := pages.next():
            out |= {r["path"]: Row(r["path"], r["size"], r["mtime"], bytes.fromhex(r["sha"]), r["reason"]) for r in page}
        pages.close()
        return {_path(k): row._replace(path=_path(k)) for k, row in out.items()}

    def vector_of(self, sha: bytes) -> np.ndarray | None:
        found = self.client.query(self.collection, filter=f'sha == "{sha.hex()}" and reason == ""', output_fields=["vector"], limit=1)
        return np.asarray(found[0]["vector"], np.float32) if found else None

    def put(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        for start in range(0, len(rows), PAGE):
            self.client.upsert(self.collection, [
                {"id": _id(r.path), "path": _text(r.path), "size": r.size, "mtime": r.mtime, "sha": r.sha.hex(), "reason": r.reason[:1000],
                 "vector": v.astype(np.float32).tolist()}
                for r, v in zip(rows[start:start + PAGE], vectors[start:start + PAGE], strict=True)])

    def drop(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), PAGE):
            self.client.delete(self.collection, ids=[_id(k) for k in keys[start:start + PAGE]])

    def nearest(self, vectors: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
        """As everywhere, but at most 16,384: Milvus finds no more at a time."""
        found = self.client.search(self.collection, data=vectors.tolist(), limit=min(k, 16384), filter='reason == ""', output_fields=["path"],
                                   search_params={"metric_type": "IP"})
        return [[(_path(hit["entity"]["path"]), float(hit["distance"])) for hit in row] for row in found]

    def begin(self) -> None:
        """Nothing to take: every row is replaced whole."""

    def end(self) -> None:
        self.client.flush(self.collection)


def _id(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _text(key: str) -> str:
    """A path as Milvus takes it: names that are not valid UTF-8 go as hexadecimal."""
    try:
        return "u:" + key.encode("utf-8").decode()
    except UnicodeEncodeError:
        return "b:" + key.encode("utf-8", "surrogateescape").hex()


def _path(text: str) -> str:
    return text[2:] if text.startswith("u:") else bytes.fromhex(text[2:]).decode("utf-8", "surrogateescape")


def open_milvus(uri: str, collection: str = "polysense", pipeline: Any = None, base: str | Path = ".") -> MilvusIndex:
    """The collection as a photo index; with a pipeline it is checked against it, and created where there is none."""
    return MilvusIndex(uri, collection, pipeline, base)
