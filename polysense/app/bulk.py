"""Encoding very many pictures over all the cores or machines of a Ray cluster (Moritz et al., Ray, OSDI 2018). Needs the extra `ray`.

`encode_folder_with_ray(photos, opener, out, *, workers=1, batch_size=64, gpus=0, progress=None) -> BulkReport`
"""
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polysense.app.files import Progress, find_photos, place, readable
from polysense.base.errors import UserError, need_extra
from polysense.pipeline import open_pipeline


@dataclass(frozen=True)
class BulkReport:
    """`encoded` vectors of width `dim` stand in `out`; `skipped` files could not be read."""
    out: str
    encoded: int
    dim: int
    skipped: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        return {"out": self.out, "encoded": self.encoded, "dim": self.dim, "skipped": [{"path": p, "reason": r} for p, r in self.skipped]}


class Encoder:
    """One worker: opens the pipeline once, then turns blocks of paths into blocks of paths, vectors and reasons."""

    def __init__(self, opener: str | Callable[[], Any], system: str | None, layout: str | None):
        self.pipeline = opener() if callable(opener) else open_pipeline(opener, system=system, layout=layout)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        seen = [readable(self.pipeline, os.fsdecode(p)) for p in block["path"].tolist()]
        good = [s for s in seen if isinstance(s, torch.Tensor)]
        features = iter(self.pipeline.encode_prepared(torch.stack(good)) if good else ())
        empty = np.zeros(self.pipeline.dim, np.float32)
        return {"path": block["path"], "vector": np.stack([empty if isinstance(s, str) else next(features) for s in seen]),
                "reason": np.array([s if isinstance(s, str) else "" for s in seen], object)}


def encode_folder_with_ray(photos: str | Path, opener: str | Path | Callable[[], Any], out: str | Path, *, system: str | None = None,
                           layout: str | None = None, workers: int = 1, batch_size: int = 64, gpus: float = 0,
                           progress: Progress | None = None) -> BulkReport:
    """Encode every picture below `photos` with `workers` copies of a pipeline and write paths and unit vectors to `out`.

    `opener` is what `open_pipeline` takes (with `system` and `layout`), or a function without arguments that returns a pipeline. `out` ends in `.npz`
    (arrays `path` [N] and `vector` [N,D]) or `.parquet` (columns path, vector), sorted by path, and appears whole at the end. A Ray cluster that
    is already connected is used; else one is started on this machine.
    """
    out = Path(out)
    if out.suffix not in {".npz", ".parquet"}:
        raise UserError(f"cannot write vectors as {out.suffix or out.name!r}", "use .npz or .parquet")
    ray = need_extra("ray", "ray")
    data = need_extra("ray.data", "ray")
    paths = [p for p, _, _ in find_photos(photos)]
    if not paths:
        raise UserError(f"no pictures in {str(photos)!r}", "check the path")
    if not ray.is_initialized():
        ray.init(num_cpus=max(2, workers), include_dashboard=False, log_to_driver=False, configure_logging=False)
    data.DataContext.get_current().enable_progress_bars = False
    count = max(1, min(len(paths) // batch_size, 8 * workers))
    blocks = data.from_items([{"path": os.fsencode(p)} for p in paths], override_num_blocks=count).map_batches(
        Encoder, fn_constructor_args=(opener if callable(opener) else str(opener), system, layout), batch_size=batch_size,
        compute=data.ActorPoolStrategy(size=workers), num_gpus=gpus or None)
    vectors: dict[str, np.ndarray] = {}
    skipped: list[tuple[str, str]] = []
    for block in blocks.iter_batches(batch_size=batch_size, batch_format="numpy"):
        for path, vector, reason in zip(map(os.fsdecode, block["path"].tolist()), block["vector"], block["reason"].tolist(), strict=True):
            if reason:
                skipped.append((path, reason))
            else:
                vectors[path] = np.asarray(vector, np.float32)
        if progress:
            progress(len(vectors) + len(skipped), len(paths))
    names = sorted(vectors)
    matrix = np.stack([vectors[n] for n in names]) if names else np.zeros((0, 0), np.float32)
    with place(out) as beside:
        save_vectors(beside, out.suffix, names, matrix)
    return BulkReport(str(out), len(names), matrix.shape[1], sorted(skipped))


def save_vectors(file: Path, suffix: str, names: list[str], matrix: np.ndarray, column: str = "path") -> None:
    """`names` [N] under the name `column`, and `vector` [N,D], as .npz or .parquet."""
    if suffix == ".npz":
        with open(file, "wb") as f:
            np.savez(f, allow_pickle=False, **{column: np.array(names, str), "vector": matrix})
        return
    arrow, parquet = need_extra("pyarrow", "parquet"), need_extra("pyarrow.parquet", "parquet")
    vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(matrix.ravel()), max(1, matrix.shape[1]))
    parquet.write_table(arrow.table({column: [os.fsencode(n).decode("utf-8", "backslashreplace") for n in names], "vector": vectors}), file)
