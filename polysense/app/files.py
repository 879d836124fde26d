"""Pictures on disk: finding them, telling whether they changed, decoding them ahead of the encoder.

`find_photos(folder, skip=...) -> Iterator[(path, size, mtime_ns)]`, `digest(path) -> bytes`, `readable(pipeline, path) -> tensor | reason`,
`ahead(work, items) -> Iterator[(item, result)]` (bounded worker threads), `place(path)` (write beside, then rename).
"""
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.images import ENDINGS

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], object]


def find_photos(folder: str | Path, skip: Iterable[Path] = (), endings: tuple[str, ...] = ENDINGS) -> Iterator[tuple[str, int, int]]:
    """(absolute path, size in bytes, mtime in ns) of every picture file (or of other `endings`) below a folder, in a fixed order.

    Hidden files and folders and the folders in `skip` are passed over; links are followed, but no real folder is entered twice, so a loop of
    links ends. Names are kept as the file system spells them. UserError where there is no such folder.
    """
    top = os.path.abspath(folder)
    if not os.path.isdir(top):
        raise UserError(f"no folder {str(folder)!r}", "check the path; an unmounted disk looks like this too")
    passed, entered = {os.path.realpath(s) for s in skip}, set()
    for here, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(here)
        if real in passed or real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings:
                path = os.path.join(here, name)
                try:
                    stat = os.stat(path)
                except OSError:                      # a dead link, or removed since the folder was listed
                    continue
                yield path, stat.st_size, stat.st_mtime_ns


def digest(path: str) -> bytes:
    """Sixteen bytes that name a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).digest()


def readable(pipeline: Any, path: str) -> Tensor | str:
    """The picture as the pipeline prepares it, [3,H,W], or the reason why it cannot be read."""
    try:
        return pipeline.prepare(path)
    except Exception as error:                       # whatever a damaged file makes a decoder raise, it is that file's fault: skipped, counted, told
        return (str(error).splitlines() or [type(error).__name__])[0]


def ahead(work: Callable[[T], R], items: Iterable[T], *, workers: int = 4, depth: int = 128) -> Iterator[tuple[T, R]]:
    """Each item with `work(item)`, in order, done by threads (decoding and hashing release the interpreter lock) that stay at most `depth` items
    in front of whoever iterates, so that memory is bounded."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def place(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; renamed onto `path` at the end, so that readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
