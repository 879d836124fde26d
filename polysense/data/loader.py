"""Batches of a source, as a preset's feed says: endless in training, one pass otherwise; always the same from the same seed.

What a batch holds depends on (seed, step) alone: not on workers, prefetching, what is kept in memory, or on how many ranks share
it (a stream of tars is the exception: its shards are dealt out to the ranks). `state()` is the position after the batch handed out
last; a new Loader with `state=` goes on from there, bit for bit.
"""
from __future__ import annotations

import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import get_all_start_methods
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from polysense.base.batch import Batch
from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.data.maker import RECENT, TEXTS, Made, Maker, check_needs, makeable, recent_names
from polysense.data.sources import BadSample, Source

__all__ = ["Loader", "check_needs"]


class Loader:
    """`for batch in Loader(source, feed, tokenizer, batch_size=128)`.

    batch_size: global, over all ranks; must divide by `world`. needs: batch keys to make ("text|audio" for either), default all that
    the source offers and the feed describes. workers: reading processes; 0 reads in threads beside the caller and keeps small
    pictures in memory (`cache_bytes`); None chooses: 0 for sources that fit into that memory. prefetch: batches made ahead.
    state: of another Loader's `state()`. `.skipped`: (sample id, reason) of all samples left out so far. Raises UserError when the
    source does not offer what is needed, when more than half of the samples cannot be read, or when the state is of other data.
    """

    def __init__(self, source: Any, feed: Feed, tokenizer: Any = None, *, batch_size: int, seed: int = 0, train: bool = True, rank: int = 0,
                 world: int = 1, workers: int | None = None, state: dict[str, Any] | None = None, needs: Sequence[str] | None = None,
                 prefetch: int = 2, cache_bytes: int = 1 << 30):
        if batch_size < 1 or batch_size % world:
            raise UserError(f"a batch of {batch_size} cannot be shared by {world} processes", f"choose a multiple of {world}")
        self.source, self.feed, self.batch_size, self.seed, self.train = source, feed, batch_size, seed, train
        self.rank, self.world, self.prefetch = rank, world, prefetch
        self.streams = not hasattr(source, "__len__")
        if not self.streams and not len(source):
            raise UserError(f"{source.name} has no samples", "is the folder empty?")
        ready = makeable(feed, train)
        ready = ready if tokenizer else ready - TEXTS
        asked = needs if needs is not None else [k for k in source.offers if k in ready]
        self.keys = check_needs(asked, source.offers, feed, source.name, train)
        if tokenizer is None and TEXTS & set(self.keys):
            raise UserError("text cannot be read without a tokenizer", "make_tokenizer(feed.text, source.captions()) trains one")
        source = source.only(self.keys) if isinstance(source, Source) else source
        self.maker = Maker(source, feed, tokenizer, self.keys, batch_size=batch_size, seed=seed, train=train, rank=rank, world=world,
                           cache_bytes=cache_bytes)
        if workers is None:
            fits = self.streams or len(source) * self.maker.bytes_a_sample() <= cache_bytes or not self.maker.reads
            workers = 0 if fits else max(1, min(8, (os.cpu_count() or 1) - 1))
        self.workers = workers
        self._notes: dict[str, str] = dict(getattr(source, "notes", ()))
        self._seen = self._bad = 0
        self._recent: deque[Made] = deque(maxlen=RECENT)
        self._at: dict[str, Any] = {"step": 0} | ({"epoch": 0, "taken": 0} if self.streams else {})
        if state is not None:
            self._resume(state)

    def _who(self) -> dict[str, Any]:
        who = {"source": self.source.name, "length": None if self.streams else len(self.source), "batch_size": self.batch_size, "seed": self.seed}
        return who | ({"world": self.world} if self.streams else {})

    def state(self) -> dict[str, Any]:
        """JSON-ready: where to go on after the batch handed out last."""
        return self._at | self._who()

    def _resume(self, state: dict[str, Any]) -> None:
        for key, ours in self._who().items():
            if state.get(key) != ours:
                raise UserError(f"the saved position is for {key} {state.get(key)!r}, this run has {ours!r}",
                                "go on with the same data, seed and batch size")
        self._at = {k: int(state[k]) for k in self._at}

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(sample id, reason) of every sample that could not be read so far, each once."""
        return list(self._notes.items())

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the source (not whole, as batches cross the border of epochs in training)."""
        return len(self.source) / self.batch_size

    def __len__(self) -> int:
        """Batches in one pass; training has no end and no length."""
        if self.train or self.streams:
            raise TypeError("an endless loader has no length")
        return -(-len(self.source) // self.batch_size)

    def names(self, index: Tensor) -> list[str]:
        """Ids of the samples with these `index` values, for messages to people."""
        return recent_names(self._recent, self.source, index)

    def __iter__(self) -> Iterator[Batch]:
        made: Any = self._in_processes() if self.workers else _ahead(self._here(), self.prefetch) if self.prefetch else self._here()
        try:
            for one in made:
                self._note(one)
                self._at = one.after
                if one.ids:
                    self._recent.append(one)
                    yield one.batch
        finally:
            made.close()
        if not self.train:
            self._at = dict.fromkeys(self._at, 0)

    def _note(self, made: Made) -> None:
        for name, why in made.skipped:
            self._notes.setdefault(name, why)
        self._seen, self._bad = self._seen + made.seen, self._bad + made.bad
        n = None if self.streams else len(self.source)
        # Draws are random in training, so that a good many of them speak for the whole; in one pass only the whole itself does.
        enough = self._seen >= min(64, n or 64) and self._bad * 2 > self._seen if self.train or n is None else self._bad * 2 > n
        if made.bad and enough:
            name, why = next(iter(self._notes.items()))
            raise UserError(f"more than half of the samples of {self.source.name} cannot be read ({self._bad} of {self._seen} tried)",
                            f"the first: {name}: {why}")

    def _steps(self) -> Iterable[int]:
        first = self._at["step"]
        return itertools.count(first) if self.train else range(first, len(self))

    def _here(self) -> Iterator[Made]:
        if self.streams:
            yield from stream_batches(self.maker, dict(self._at))
        else:
            for step in self._steps():
                made = self.maker.make(step)
                made.after = {"step": step + 1}
                yield made

    def _in_processes(self) -> Iterator[Made]:
        how: dict[str, Any] = {"batch_size": None, "num_workers": self.workers, "collate_fn": _same, "prefetch_factor": self.prefetch or 1,
                               "multiprocessing_context": "fork" if "fork" in get_all_start_methods() else None}
        loader = DataLoader(_Stream(self.maker, dict(self._at)), **how) if self.streams else \
            DataLoader(_Steps(self.maker), sampler=self._steps(), **how)
        for made in loader:
            if isinstance(made, UserError):
                raise made
            yield made


def _same(made: Any) -> Any:
    return made


class _Steps(Dataset):
    """Batches by number, for reading processes."""

    def __init__(self, maker: Maker):
        self.maker = maker

    def __getitem__(self, step: int) -> Made | UserError:
        try:
            made = self.maker.make(step)
        except UserError as error:  # goes over as a value: the DataLoader would bury it in a traceback
            return error
        made.after = {"step": step + 1}
        return made


class _Stream(IterableDataset):
    """Batches of a stream: process w of W makes every W-th one, skipping the others undecoded; the DataLoader takes them in turn."""

    def __init__(self, maker: Maker, at: dict[str, int]):
        self.maker, self.at = maker, at

    def __iter__(self) -> Iterator[Made | UserError]:
        info = get_worker_info()
        try:
            yield from stream_batches(self.maker, self.at, info.id if info else 0, info.num_workers if info else 1)
        except UserError as error:
            yield error


def stream_batches(maker: Maker, at: dict[str, int], turn: int = 0, turns: int = 1) -> Iterator[Made]:
    """Batches of a stream from the position {step, epoch, taken}: every `turns`-th, beginning with number `turn`.

    `taken` counts the samples that this rank drew in the epoch; resuming reads the epoch's shards again up to there without decoding.
    A sample that cannot be decoded is replaced by the next good one of its batch.
    """
    source, local = maker.source, maker.batch_size // maker.world
    step, epoch, taken, count = at["step"], at["epoch"], at["taken"], 0
    raw: list[Any] = []
    while True:
        found = 0
        for k, item in enumerate(source.samples(maker.seed, epoch, maker.train, maker.rank, maker.world)):
            found += 1
            if k < taken:
                continue
            raw.append(item)
            taken = k + 1
            if len(raw) == local:
                if count % turns == turn:
                    yield _stream_made(maker, raw, step, {"step": step + 1, "epoch": epoch, "taken": taken})
                raw, step, count = [], step + 1, count + 1
        if not found:
            raise UserError(f"{source.name} holds no samples", "; ".join(f"{n}: {why}" for n, why in source.notes) or "check the address of its tars")
        if not maker.train:
            if raw and count % turns == turn:
                yield _stream_made(maker, raw, step, {"step": step + 1, "epoch": epoch, "taken": taken})
            return
        epoch, taken = epoch + 1, 0


def _stream_made(maker: Maker, raw: list[Any], step: int, after: dict[str, int]) -> Made:
    skipped: list[tuple[str, str]] = [(n, why) for n, why in maker.source.notes]
    first, good = step * maker.batch_size + maker.rank * (maker.batch_size // maker.world), []
    for k, item in enumerate(raw):
        try:
            about = maker.source.about(item)
            about, arrays = maker.ready(about, lambda key, item=item: maker.source.load(item, key))
            maker.check(about)
            good.append((first + k, about, arrays))
        except BadSample as bad:
            skipped.append((bad.id, bad.reason))
            good.append(None)
    bad = sum(g is None for g in good)
    if maker.train and any(good):
        following = itertools.cycle([g for g in good if g])
        good = [g if g else next(following) for g in good]
    made = maker.assemble([g for g in good if g], step, skipped, len(raw), bad)
    made.after = after
    return made


def _ahead(items: Iterator[Made], depth: int) -> Iterator[Made]:
    """The same items, made up to `depth` ahead in a thread that ends with the consumer; errors are raised where they would have been."""
    full: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(thing: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                full.put(thing, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True, name="polysense-ahead")
    thread.start()
    try:
        while True:
            kind, thing = full.get()
            if kind == "error":
                raise thing
            if kind == "end":
                return
            yield thing
    finally:
        stop.set()
        thread.join()
