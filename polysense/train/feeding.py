"""Where a run's batches come from: the source, the tokeniser and the loader of the data floor, under one small interface."""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch

from polysense.base.batch import Batch
from polysense.base.errors import UserError
from polysense.base.plan import Preset, Stage, WordsPlan
from polysense.base.spec import Spec
from polysense.base.telling import Cleaned
from polysense.train.folder import Run
from polysense.train.parallel import World

TEXTS = {"text", "text_mask", "word", "names", "question", "answer", "chat", "chat_reply", "brief", "brief_reply", "episode"}  # by a tokenizer


class Stream(Protocol):
    """Endless batches with a position. `skipped`: samples that could not be read, as (id, reason) pairs."""
    @property
    def skipped(self) -> list[tuple[str, str]]: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> Any:
        """JSON-ready position behind the last batch that was taken."""
        ...


class Feeding(Protocol):
    """What `train_preset` asks of its data."""
    name: str
    size: int | None                         # None: a stream, nobody knows
    tokenizer: Any

    def open(self, keep_tokenizer: Callable[..., Any], lent: Any) -> None:
        """Called once, before the first batch. keep_tokenizer(make, load) keeps a tokenizer in the run folder; `lent` is that of a Start."""
        ...

    def stream(self, stage: Stage, seed: int, state: Any, world: World) -> Stream: ...

    def names(self, rows: list[int]) -> list[str]:
        """Sample ids of `batch["index"]`."""
        ...


class SourceFeeding:
    """The samples of `preset.data` as `preset.feed` says. Raises UserError where they do not offer what the system needs."""

    def __init__(self, preset: Preset, needs: Iterable[str], split: str = "train", workers: int | None = None):
        from polysense.data import source
        from polysense.data.loader import check_needs
        from polysense.data.told import told

        self.preset, self.needs, self.workers, self.tokenizer = preset, tuple(needs), workers, None
        self.plain = source(preset.data, split=split)
        self.source = told(self.plain, preset.feed)
        if isinstance(preset.feed.text, WordsPlan):          # a new word is learned from pictures alone: few, and none names it
            from polysense.data.concept import called

            self.source = called(self.source, preset.feed.text, max((s.batch_size for s in preset.stages), default=0))
        self.name, self.size = self.source.name, len(self.source) if hasattr(self.source, "__len__") else None
        self.keys = check_needs(self.needs, self.source.offers, preset.feed, self.name, True)
        if self.size == 0:
            raise UserError(f"{preset.data} holds no samples", "look at the folder, or choose another split")
        if self.size is not None and (largest := max((s.batch_size for s in preset.stages), default=0)) > self.size:
            raise UserError(f"a batch of {largest} is larger than {self.name} with its {self.size} samples",
                            f"set batch_size={self.size} or less, or add data")

    def judged(self, run: Run) -> str:
        """Tells the samples anew, with a run that judges whether a picture shows what is said; returns a line about it."""
        from polysense.data.told import tellings, told
        from polysense.train.judging import CachedJudge

        self.source = told(self.plain, self.preset.feed, CachedJudge(run))
        self.size = len(self.source)
        if any(isinstance(t, Cleaned) for t in tellings(self.preset.feed)):
            return f"{self.size:,} of {len(self.plain):,} samples are fit for training, says {run.id}"
        labels = self.source.labels()
        return f"{sum(label >= 0 for label in labels):,} of {len(labels):,} samples show what their texts name, says {run.id}"

    def open(self, keep_tokenizer: Callable[..., Any], lent: Any) -> None:
        plan = self.preset.feed.text
        if plan is None or (self.preset.stages and not TEXTS.intersection(self.keys)):      # what trains nothing keeps the words of its Start
            return
        from polysense.data.chat import texts_of
        from polysense.data.tokenizer import load_tokenizer, make_tokenizer

        def make() -> Any:
            return lent if lent is not None and lent.plan == getattr(plan, "plain", plan) else make_tokenizer(plan, texts_of(self.source, plan))

        def load(folder: Path) -> Any:
            return load_tokenizer(folder, plan)

        self.tokenizer = keep_tokenizer(make, load)
        for path, vocab in vocabularies(self.preset.config):
            if self.tokenizer.vocab > vocab:
                raise UserError(f"the tokenizer has {self.tokenizer.vocab} tokens, but {path}={vocab}", f"set feed.text.vocab to at most {vocab}")

    def stream(self, stage: Stage, seed: int, state: Any, world: World) -> Stream:
        from polysense.data.loader import Loader

        more = {} if self.workers is None else {"workers": self.workers}
        self.loader = Loader(self.source, self.preset.feed, self.tokenizer, batch_size=stage.batch_size, seed=seed, train=True,
                             rank=world.rank, world=world.size, state=state, needs=self.needs, **more)
        return self.loader

    def names(self, rows: list[int]) -> list[str]:
        return self.loader.names(torch.tensor(rows))


def vocabularies(config: Spec, path: str = "config") -> Iterator[tuple[str, int]]:
    """(dotted path, value) of every field called `vocab` in a configuration."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "vocab" and isinstance(value, int):
            yield f"{path}.vocab", value
        elif isinstance(value, Spec):
            yield from vocabularies(value, f"{path}.{f.name}")
