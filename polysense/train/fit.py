"""The whole training loop. A generator: whoever iterates decides about logs, evaluation and checkpoints."""
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from math import isfinite

import torch
from torch import Tensor, nn

from polysense.base.batch import Batch, Losses
from polysense.base.errors import UserError
from polysense.base.plan import Stage
from polysense.base.system import After, System
from polysense.train.gradients import backward, size_of
from polysense.train.health import EVERY
from polysense.train.state import Names, Training, equipped


@dataclass
class Step:
    """One step done."""
    index: int                               # steps done in this stage, counting this one
    losses: dict[str, float]                 # unweighted terms, means over ranks
    total: float                             # their weighted sum: what was minimised
    seconds: float                           # from asking for the batch to the moved weights
    waited: float                            # the part of it spent on waiting for the batch
    lr: float                                # before the scales of parameter groups
    grad_norm: float                         # before clipping
    samples: int                             # in the global batch
    health: dict[str, float] = field(default_factory=dict)       # what the system says of itself, every few steps; of the first rank's samples


class Diverged(UserError):
    """The loss or the gradient stopped being a number; the weights are those of the step before."""

    def __init__(self, step: int, losses: dict[str, float], grad_norm: float, samples: list[str], suspects: list[str]):
        self.step, self.losses, self.grad_norm, self.samples, self.suspects = step, losses, grad_norm, samples, suspects
        terms = ", ".join(f"{k}={v:.4g}" for k, v in losses.items())
        shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        super().__init__(f"training diverged at step {step} ({terms}, gradient norm {grad_norm:.4g}) on the samples {shown}",
                         f"the samples {', '.join(suspects[:8])} hold values that are not finite" if suspects else
                         "lower optim.lr, set optim.clip, train with precision=fp32, or look at these samples")


def fit(system: System, stage: Stage, batches: Iterable[Batch], *, training: Training | None = None, names: Names | None = None,
        clock: Callable[[], float] | None = None) -> Iterator[Step]:
    """Trains `system` through `stage`, one `Step` at a time.

    training: a stage under way to go on with (made fresh by default). names: turns `batch["index"]` into sample ids for error messages.
    clock: the fraction of a time budget that is spent; the schedule runs ahead with it and the stage ends when it reaches 1.
    A stage with `run` is handed to that generator: `run(system, stage, batches, training)` yields the `Losses` of each of its steps,
    steps its optimisers through `training.optimizer_for` and `training.descend`, and after a resume begins at `training.index`.
    Raises Diverged before a loss or gradient that is not finite can touch the weights, UserError where the data end before the stage.
    """
    training = training or Training(system, stage)
    world, watched = training.world, Watched(batches, training.world.device)
    with equipped(system, stage):
        own = stage.run(system, stage, watched, training) if stage.run else None
        while training.index < stage.steps:
            start = time.perf_counter()
            training.progress = world.agreed(clock()) if clock else 0.0
            if training.progress >= 1:
                break
            with world.spreading():
                lr, (losses, norm) = training.lr(), advance(training, watched, own, names)
            total = sum(dict(stage.weights).get(k, 1.0) * v for k, v in losses.items())
            yield Step(training.index, losses, total, time.perf_counter() - start, watched.waited, lr, norm, watched.samples * world.size,
                       training.health)


def advance(training: Training, batches: "Watched", own: Iterator[Losses] | None, names: Names | None) -> tuple[dict[str, float], float]:
    """One step of the stage, by gradient or by the recipe's own generator; returns its losses and gradient norm, checked and finite."""
    system, stage, world = training.system, training.stage, training.world
    if own is not None:
        said = next(own, None)
        if said is None:
            raise UserError(f"stage {stage.name} ended at step {training.index} of {stage.steps}", "its generator must go on as long")
        losses, keep, norm, optimizer = said, said.keep, torch.tensor(training.norm), next(iter(training.optimizers.values()))
    else:
        optimizer = training.optimizer_for("main")
        optimizer.zero_grad(set_to_none=True)
        losses, keep = backward(training.model, stage, next(batches), training.autocast, lambda last: world.sync(training.model, last))
        norm = training.gather_gradients(optimizer)
    means = world.mean(torch.stack([v.detach().float() for v in losses.values()]))
    *numbers, grad_norm = torch.cat([means, norm.float().view(1).to(means.device)]).tolist()      # the one wait for the device in a step
    named = dict(zip(losses, numbers))
    if not all(map(isfinite, (*numbers, grad_norm))):
        raise diverged(training, named, grad_norm, batches.last, names)
    if own is None:
        training.step(optimizer, grad_norm)
    training.index += 1
    with torch.no_grad():
        system.after_step(After(training.index, max(training.index / stage.steps, training.progress), optimizer, keep))
        look = training.index % EVERY == 0 or training.index == stage.steps
        training.health = {k: n for k, v in system.health(keep).items() if isfinite(n := float(v))} if look else {}
    if training.average:
        training.average.move()
    return named, grad_norm


class Watched:
    """The batches of a stage, moved to the device; remembers the last one and how long it took to come."""

    def __init__(self, batches: Iterable[Batch], device: torch.device):
        self.batches, self.device, self.taken = iter(batches), device, count(1)
        self.last: Batch = {}
        self.waited, self.samples = 0.0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start, taken = time.perf_counter(), next(self.taken)
        batch = next(self.batches, None)
        if batch is None:
            raise UserError(f"the data ended after {taken - 1} batches", "give the stage an endless stream, or fewer steps")
        self.waited, self.last, self.samples = time.perf_counter() - start, batch, size_of(batch)
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}


def diverged(training: Training, losses: dict[str, float], grad_norm: float, batch: Batch, names: Names | None) -> Diverged:
    """The error for this batch, with the samples of all ranks; those whose own values are not finite are its suspects."""
    rows = batch["index"].tolist() if "index" in batch else list(range(size_of(batch)))
    ids = names(rows) if names and "index" in batch else [str(r) for r in rows]
    bad = torch.zeros(len(rows), dtype=torch.bool)
    for value in (v for v in batch.values() if isinstance(v, Tensor) and v.is_floating_point()):
        bad |= ~value.flatten(1).isfinite().all(1).cpu() if value.ndim > 1 else ~value.isfinite().cpu()
    world, suspects = training.world, [i for i, b in zip(ids, bad.tolist()) if b]
    return Diverged(training.index + 1, losses, grad_norm, [*chain(*world.gathered(ids))], [*chain(*world.gathered(suspects))])


def parameters(system: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameter counts."""
    return sum(p.numel() for p in system.parameters()), sum(p.numel() for p in system.parameters() if p.requires_grad)
