"""Features of a folder of pictures, videos or sounds, or of a file of texts, into one file."""
from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from polysense.base.errors import UserError


def encode_file(source: Path, out: Path, opener: Callable[[], Any], named: tuple[str, str | None, str | None], workers: int,
                progress: Callable[[int, int], object], batch_size: int = 64, of: str = "") -> dict[str, Any]:
    """Writes `path` [N] and `vector` [N,D] (for texts `text` and `vector`); returns {out, encoded, dim, skipped: [(path, reason)]}.

    of: which of what a folder holds ("pictures", "videos", "sounds"); by default the first of these kinds that is there.
    """
    if out.suffix not in (".npz", ".parquet"):
        raise UserError(f"cannot write vectors as {out.suffix or out.name!r}", "use .npz or .parquet")
    if of not in ("", *KINDS):
        raise UserError(f"there are no {of!r} to encode", f"say --of {', '.join(KINDS)}")
    if (kind := _kind(source, of)) in ("videos", "sounds"):
        return _clips(source, out, opener(), progress, kind)
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


KINDS = ("pictures", "videos", "sounds")


def _endings(kind: str) -> tuple[str, ...]:
    from polysense.data import clips
    from polysense.data.images import ENDINGS

    return {"pictures": ENDINGS, "videos": clips.MOVIE_ENDINGS, "sounds": clips.SOUND_ENDINGS}[kind]


def _kind(source: Path, of: str) -> str:
    """What is to be encoded: `of`, else the first kind that a folder holds; of a file, what its name ends in ("" for texts)."""
    from polysense.app.files import find_photos

    if source.is_file():
        return next((k for k in KINDS[1:] if source.suffix.lower() in _endings(k)), "")
    return of or (next((k for k in KINDS if next(find_photos(source, endings=_endings(k)), None)), "pictures") if source.is_dir() else "")


def _clips(source: Path, out: Path, pipeline: Any, progress: Callable[[int, int], object], kind: str) -> dict[str, Any]:
    """Videos or sounds, one at a time; what cannot be read is left out and told."""
    import numpy as np

    from polysense.app.files import find_photos
    from polysense.data.clips import BadClip

    paths = [str(source)] if source.is_file() else [p for p, _, _ in find_photos(source, endings=_endings(kind))]
    if not paths:
        raise UserError(f"no {kind} in {str(source)!r}", "check the path")
    names, vectors, skipped = [], [], []
    for i, path in enumerate(paths):
        try:
            vectors.append(pipeline.encode(**{"videos" if kind == "videos" else "audios": [path]})[0])
            names.append(path)
        except BadClip as error:
            skipped.append((path, str(error)))
        progress(i + 1, len(paths))
    if not names:
        raise UserError(f"none of {len(paths)} {kind} can be read", skipped[0][1])
    _save(out, "path", names, np.stack(vectors))
    return {"out": str(out), "encoded": len(names), "dim": len(vectors[0]), "skipped": skipped}


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
