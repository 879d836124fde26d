"""Searching a folder of videos or sounds by words. What was encoded is kept beside them, so that only new and changed files are read again.

`search_clips(pipeline, folder, text, kind="videos", count=10) -> Found`
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polysense.app.files import find_photos, place
from polysense.base.errors import UserError
from polysense.data.clips import MOVIE_ENDINGS, SOUND_ENDINGS, BadClip
from polysense.pipeline.clips import similarities

KINDS = {"videos": (MOVIE_ENDINGS, "encode_video"), "sounds": (SOUND_ENDINGS, "encode_audio")}
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class ClipHit:
    """One answer: `score` is the cosine of the text with the nearest of the clip's vectors."""
    rank: int
    path: str
    score: float


@dataclass
class Found:
    """The answers, best first, and what was done before: `encoded` files were new or changed, `skipped` ones cannot be read (path, reason)."""
    hits: list[ClipHit]
    clips: int
    encoded: int
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "skipped": [{"path": p, "reason": r} for p, r in self.skipped]}


def search_clips(pipeline: Any, folder: str | Path, text: str, *, kind: str = "videos", count: int = 10, progress: Progress | None = None) -> Found:
    """The clips of a folder (at any depth) that fit a text best.

    Their vectors are kept in `.polysense-KIND.npz` in the folder, or where the folder cannot be written, nowhere; another model, or another
    version of a file, is encoded anew. UserError for an empty query, a folder without clips, or a system that cannot.
    """
    if kind not in KINDS:
        raise UserError(f"there are no {kind!r} to search", f"say {' or '.join(KINDS)}")
    if not text.strip():
        raise UserError("the query is empty", "say what to look for")
    endings, capability = KINDS[kind]
    for needed in (capability, "encode_text"):
        if not pipeline.can(needed):
            raise UserError(f"{pipeline.id or 'this system'} cannot {needed}", "see `polysense list --can " + needed + "`")
    files = {path: f"{size} {time}" for path, size, time in find_photos(folder, endings=endings)}
    if not files:
        raise UserError(f"no {kind} in {str(folder)!r}", "check the path")
    store = Path(folder) / f".polysense-{kind}.npz"
    kept = {path: (stamp, vectors) for path, (stamp, vectors) in read(store, pipeline.digest).items() if files.get(path) == stamp}
    skipped: list[tuple[str, str]] = []
    fresh = [path for path in files if path not in kept]
    for i, path in enumerate(fresh):
        try:
            vectors = pipeline.encode_video_parts(path) if kind == "videos" else pipeline.encode(audios=[path])
            kept[path] = files[path], vectors
        except BadClip as error:
            skipped.append((path, str(error)))
        if progress:
            progress(i + 1, len(fresh))
    if not kept:
        raise UserError(f"none of {len(files)} {kind} can be read", skipped[0][1])
    if len(fresh) > len(skipped):
        write(store, pipeline.digest, kept)
    paths = sorted(kept)
    score = similarities([kept[p][1] for p in paths], pipeline.encode(texts=[text]))[0]
    best = np.argsort(-score, kind="stable")[:count]
    hits = [ClipHit(k + 1, paths[i], float(score[i])) for k, i in enumerate(best)]
    return Found(hits, len(paths), len(fresh) - len(skipped), skipped)


Kept = dict[str, tuple[str, np.ndarray]]


def read(store: Path, digest: str) -> Kept:
    """path -> (stamp of the file, vectors [K,D]) as kept; empty where nothing is, where it is damaged, or where another model made it."""
    try:
        with np.load(store, allow_pickle=False) as held:
            if str(held["digest"]) != digest:
                return {}
            parts = np.split(held["vectors"], np.cumsum(held["counts"])[:-1])
            return {str(p): (str(s), v) for p, s, v in zip(held["paths"], held["stamps"], parts, strict=True)}
    except (OSError, ValueError, KeyError, EOFError):
        return {}
    except Exception as error:  # zipfile raises its own on damaged archives
        if type(error).__module__ != "zipfile":
            raise
        return {}


def write(store: Path, digest: str, kept: Kept) -> None:
    """Keeps what was encoded; a folder that cannot be written is searched all the same."""
    paths = sorted(kept)
    try:
        with place(store) as beside, open(beside, "wb") as file:
            np.savez(file, digest=np.array(digest), paths=np.array(paths), stamps=np.array([kept[p][0] for p in paths]),
                     counts=np.array([len(kept[p][1]) for p in paths]), vectors=np.concatenate([kept[p][1] for p in paths]))
    except OSError:
        return
