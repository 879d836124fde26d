"""Features of a folder of pictures or of a file of texts, into one file."""
from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError


def encode_file(source: Path, out: Path, opener: Callable[[], Any], named: tuple[str, str | None, str | None], workers: int,
                progress: Callable[[int, int], object], batch_size: int = 64) -> dict[str, Any]:
    """Writes `path` [N] and `vector` [N,D] (for texts `text` and `vector`); returns {out, encoded, dim, skipped: [(path, reason)]}."""
    if out.suffix not in (".npz", ".parquet"):
        raise UserError(f"cannot write vectors as {out.suffix or out.name!r}", "use .npz or .parquet")
    if source.is_file():
        return _texts(source, out, opener(), progress)
    if not source.is_dir():
        raise UserError(f"no folder or file {str(source)!r}", "check the path")
    if workers:
        from polysense.app.bulk import encode_folder_with_ray

        model, system, layout = named
        told = encode_folder_with_ray(source, model, out, system=system, layout=layout, workers=workers, progress=progress)
        return {"out": told.out, "encoded": told.encoded, "dim": told.dim, "skipped": told.skipped}
    import numpy as np
    import torch

    from polysense.app.files import ahead, find_photos, readable

    paths = [p for p, _, _ in find_photos(source)]
    if not paths:
        raise UserError(f"no pictures in {str(source)!r}", "check the path")
    pipeline = opener()
    names, vectors, skipped = [], [], []
    read = ahead(lambda p: readable(pipeline, p), paths)
    while batch := list(islice(read, batch_size)):
        good = [(path, seen) for path, seen in batch if not isinstance(seen, str)]
        skipped += [(path, seen) for path, seen in batch if isinstance(seen, str)]
        if good:
            names += [path for path, _ in good]
            vectors.append(pipeline.encode_prepared(torch.stack([seen for _, seen in good])))
        progress(len(names) + len(skipped), len(paths))
    matrix = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
    _save(out, "path", names, matrix)
    return {"out": str(out), "encoded": len(names), "dim": matrix.shape[1], "skipped": skipped}


def _texts(source: Path, out: Path, pipeline: Any, progress: Callable[[int, int], object]) -> dict[str, Any]:
    try:
        texts = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read texts from {str(source)!r}", "give a folder of pictures, or a UTF-8 file with one text a line") from error
    matrix = pipeline.encode(texts=texts, progress=progress)
    _save(out, "text", texts, matrix)
    return {"out": str(out), "encoded": len(texts), "dim": matrix.shape[1], "skipped": []}


def _save(out: Path, column: str, names: list[str], matrix: Any) -> None:
    import numpy as np

    from polysense.app.bulk import save_vectors
    from polysense.app.files import place

    with place(out) as beside:
        save_vectors(beside, out.suffix, names, np.asarray(matrix), column)
