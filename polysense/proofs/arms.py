"""What proofs share: training one arm in memory, and the plain scores they compare."""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from polysense.base.batch import Batch
from polysense.base.system import Feed, Preset, System
from polysense.data.chat import texts_of
from polysense.data.loader import Loader
from polysense.data.sources import Sample, Source, Subset
from polysense.data.tokenizer import make_tokenizer
from polysense.data.told import Judge, told
from polysense.pipeline import Pipeline
from polysense.tasks import take
from polysense.train.fit import fit
from polysense.train.state import Training


@dataclass
class Arm:
    """One trained arm of a comparison."""
    subject: Pipeline
    losses: list[float] = field(default_factory=list)        # weighted total, step by step

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10):]
        return sum(last) / len(last)


def train_arm(id: str, preset: Preset, source: Source, *, needs: tuple[str, ...], seed: int, tokenizer: Any = None,
              prepare: Callable[[System], None] | None = None, batches: Iterable[Batch] | None = None,
              clock: Callable[[], float] | None = None, judge: Judge | None = None) -> Arm:
    """Trains a preset on a source as its feed tells it, or on `batches` of its own. judge: whom the feed asks about pictures and texts. prepare: puts
    weights in before the first step. clock: see `fit`."""
    torch.manual_seed(seed)
    system = preset.config.build()
    if prepare is not None:
        prepare(system)
        system.after_start()
    source = told(source, preset.feed, judge)
    tokenizer = words(preset, source) if tokenizer is None and preset.feed.text else tokenizer
    losses: list[float] = []
    for stage in preset.stages:
        fed = Loader(source, preset.feed, tokenizer, batch_size=stage.batch_size, seed=seed, needs=needs) if batches is None else batches
        training = Training(system, stage)
        losses += [step.total for step in fit(system, stage, fed, training=training, clock=clock)]
        if training.average:                 # where a run keeps an average of its weights, that is what is examined
            system.load_state_dict(training.average.weights, strict=False)
    return Arm(Pipeline(system.eval(), preset, tokenizer, id=id), losses)


def words(preset: Preset, source: Source) -> Any:
    """A tokenizer trained on the captions of a source, for systems that write also on its questions."""
    assert preset.feed.text is not None
    return make_tokenizer(preset.feed.text, texts_of(source, preset.feed.text))


def accuracy(subject: Any, source: Source, batch_size: int = 250) -> float:
    """Share of the pictures that `classify` puts into their class."""
    right = total = 0
    with torch.inference_mode():
        for batch in Loader(source, subject.preset.feed, None, batch_size=batch_size, train=False, needs=("image", "label")):
            right += int((subject.system.classify(batch["image"]).argmax(1) == batch["label"]).sum())
            total += len(batch["label"])
    return right / total


def read_all(feed: Feed, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Every picture of a source as it is read outside training [N,3,H,W], and its label [N]."""
    batches = list(Loader(source, feed, None, batch_size=500, train=False, needs=("image", "label")))
    return torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])


def drawn(image: torch.Tensor, label: torch.Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Endless random batches of pictures that are in memory; every sample once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(image), generator=generator)
        for rows in order[:len(order) // size * size].split(size):
            yield {"image": image[rows], "label": label[rows]}


def share_right(system: System, image: torch.Tensor, label: torch.Tensor) -> float:
    """Share of pictures in memory that `classify` puts into their class."""
    with torch.inference_mode():
        return float((torch.cat([system.classify(x).argmax(1) for x in image.split(500)]) == label).float().mean())  # type: ignore[attr-defined]


def few_of_each(source: Source, each: int, seed: int) -> Subset:
    """`each` random samples of every class."""
    labels = torch.tensor(source.labels())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return Subset(source, [int(i) for c in labels.unique() for i in order[labels[order] == c][:each]])


def some_of(source: Source, n: int, seed: int) -> Subset:
    """n random samples."""
    return Subset(source, torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:n].tolist())


def rest_of(source: Source, n: int, seed: int) -> Subset:
    """The samples that `some_of(source, n, seed)` leaves out."""
    return Subset(source, torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[n:].tolist())


class Present(Subset):
    """A source with only the classes that occur in it, numbered anew: the candidates of a zero-shot exam on unseen classes."""

    def __init__(self, base: Source):
        super().__init__(base, range(len(base)))
        seen = sorted(set(base.labels()))
        self.classes, self.number = tuple(base.classes[c] for c in seen), {c: i for i, c in enumerate(seen)}

    def _about(self, i: int) -> Sample:
        about = self.base.about(i)
        return {**about, "label": self.number[int(about["label"])]}


def exam(name: str, subject: Any, test: Source, metric: str, train: Source | None = None, **options: Any) -> float:
    """One number of one exam."""
    return float(take(name, subject, test, train=train, **options).metrics[metric].value)
