"""One run from preset to weights: starts, data, stages, checkpoints, log. A generator of events; the command line only draws them."""
import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polysense.base.batch import check_batch
from polysense.base.catalogue import card_of, preset_of
from polysense.base.errors import UserError, need_extra
from polysense.base.plan import Preset, Stage
from polysense.base.system import System
from polysense.train import checkpoint, starts
from polysense.train.adapting import RunStart, adapted, brought, save_adapter
from polysense.train.events import Event, Finished, Noted, Saved, Started, Stepped
from polysense.train.feeding import Feeding, SourceFeeding, Stream
from polysense.train.fit import Step, fit, parameters
from polysense.train.folder import AVERAGED, WEIGHTS, Folder, Run, load_run
from polysense.train.health import Watch
from polysense.train.judging import judge_start
from polysense.train.parallel import World, whole_tensor, world
from polysense.train.precision import resolve
from polysense.train.preflight import SAMPLES, preflight
from polysense.train.state import Training

__all__ = ["Event", "Finished", "Noted", "Run", "Saved", "Started", "Stepped", "load_run", "override", "shortened", "train", "train_preset"]


def train(system_id: str, preset: str = "tiny", *, data: str | None = None, steps: int | None = None, overrides: dict[str, Any] | None = None,
          adapt: str | None = None, base: str | Path | None = None, begin: Sequence[str] = (), **options: Any) -> Iterator[Event]:
    """Trains a system of the catalogue; iterate to the end. `options` are those of `train_preset`.

    data: sources joined by "+", in place of the preset's. steps: total, in place of the preset's; schedules span the new number.
    overrides: dotted changes (see `override`). adapt: a mechanism to train on the frozen system (see adapting.py), base: the run that it goes onto;
    by default the preset's own, trained once. begin: "vision=runs/clip:vision", parts that begin as those of runs of yours (see `brought`). Raises
    UserError for anything the user can mend, `Diverged` where training broke down.
    """
    plan = brought(override(preset_of(system_id, preset), overrides or {}), begin)
    if not issubclass(plan.config.owner, System):
        raise UserError(f"{system_id} is an agent: it has no weights to train", f'use it: polysense agent {system_id} PHOTO --ask "..."')
    plan = adapted(system_id, preset, plan, adapt, base) if adapt else plan
    plan = plan.but(data=data) if data else plan
    plan = shortened(plan, steps) if steps is not None else plan
    yield from train_preset(system_id, plan, card_of(system_id).needs, name=preset, overrides=overrides, **options)


def override(preset: Preset, changes: dict[str, Any]) -> Preset:
    """Dotted changes to a preset. A path starts at the preset (`stages.0.steps`), at its config (`vision.body.depth`) or, for all stages at
    once, at a stage (`batch_size`, `optim.lr`). What the system offers as `choices` is set by a word: `centre=sinkhorn`. Raises UserError for
    unknown names and wrong types."""
    named = getattr(type(preset.config).owner, "choices", {})
    ours, of_stage = {f.name for f in fields(preset)}, {f.name for f in fields(Stage)}
    of_config = {f.name for f in fields(preset.config)}
    for path, value in changes.items():
        head = path.split(".")[0]
        word = "none" if value is None else value        # typed as none, it has become None
        if path in named and isinstance(word, str):
            if word not in named[path]:
                raise UserError(f"no {path} is called {word!r}", f"it is one of {', '.join(named[path])}")
            preset = named[path][word](preset)
        elif head in ours:
            preset = preset.but(**{path: value})
        elif head in of_stage and head not in of_config:
            preset = preset.but(**{f"stages.{i}.{path}": value for i in range(len(preset.stages))})
        else:
            preset = preset.but(**{f"config.{path}": value})
    return preset


def shortened(preset: Preset, steps: int) -> Preset:
    """The preset with `steps` steps in all, shared among its stages in their proportion; warm-ups keep their share of a shorter stage."""
    if not preset.stages:
        raise UserError("this preset trains nothing, so it takes no steps", "leave steps out; the runs it stands on are trained by themselves")
    if steps < len(preset.stages):
        raise UserError(f"steps={steps} is too few", f"the preset has {len(preset.stages)} stage(s), each takes at least one step")
    left, total, changes = steps, sum(s.steps for s in preset.stages), {}
    for i, stage in enumerate(preset.stages):
        later = len(preset.stages) - i - 1
        mine = left if not later else min(left - later, max(1, round(steps * stage.steps / total)))
        changes |= {f"stages.{i}.steps": mine, f"stages.{i}.optim.warmup": min(stage.optim.warmup, round(stage.optim.warmup * mine / stage.steps))}
        left -= mine
    return preset.but(**changes)


def train_preset(id: str, preset: Preset, needs: Iterable[str], *, name: str = "tiny", split: str = "train", out: str | Path | None = None,
                 seed: int = 0, resume: bool = False, overrides: dict[str, Any] | None = None, device: str | None = None, parallel: str = "ddp",
                 checkpoint_every: int | None = None, log_every: int = 1, time_budget_s: float | None = None, workers: int | None = None,
                 wandb: str | None = None, feeding: Feeding | None = None, depth: int = 0, preflight: bool = False) -> Iterator[Event]:
    """Trains a preset that need not be in the catalogue, into a run folder.

    out: the folder (`runs/<id>-<name>` with a free number by default), new or empty, or with resume=True that of the same run, which goes on
    bit-exactly from its last whole checkpoint (on one process). checkpoint_every: steps between checkpoints; by default as often as keeps
    their cost near a twentieth of the time. time_budget_s: seconds of training, shared among stages; the schedules fit into it. workers:
    decoding processes. parallel: "ddp" or "fsdp", under torchrun. wandb: project to log to. feeding: other batches than the data floor's.
    preflight: look at a new run for a second before its first step, and refuse one that cannot learn (see preflight.py).
    """
    if wandb:
        need_extra("wandb", "wandb")
    with world(device, parallel) as here:
        torch.set_flush_denormal(True)
        for i, stage in enumerate(preset.stages):
            if stage.batch_size % here.size:
                raise UserError(f"batch_size={stage.batch_size} of stage {i} cannot be shared by {here.size} ranks", "make it a multiple")
        if resume and out is None:
            raise UserError("a resumed run needs its folder", "say which one with --out")
        asked = judge_start(preset)
        feeding = feeding or SourceFeeding(preset, needs, split, workers)
        folder = Folder(here.leading(lambda: Path(out) if out else free_folder(id, name)))
        facts = {"system": id, "preset": name, "overrides": overrides or {}, "plan": preset.to_dict(), "seed": seed, "data": preset.data,
                 "split": split, "ranks": here.size}
        before = here.leading(lambda: folder.claim(facts, preset, resume))
        if folder.weights.exists():
            yield Noted(id, folder.path, f"{folder.path} is finished: nothing is left to do")
            yield Finished(id, folder.path, sum(s.steps for s in preset.stages), {}, 0.0, 0, folder.weights)
            return
        bases: list[Run] = []
        sitting = Sitting(id, name, preset, tuple(needs), folder, seed, here, checkpoint_every, log_every, time_budget_s)
        try:
            for start in preset.starts:
                bases.append((yield from base_of(start, id, folder, depth, here, {"device": device, "parallel": parallel, "workers": workers})))
            if asked and isinstance(feeding, SourceFeeding):
                judge = yield from base_of(asked, id, folder, depth, here, {"device": device, "parallel": parallel, "workers": workers})
                yield Noted(id, folder.path, feeding.judged(judge))
            sitting.prepare(feeding, bases)
            if preflight and not sitting.step:
                yield Noted(id, folder.path, sitting.doubted())
        except UserError:
            if here.first and not before:                # a run that never began leaves nothing behind
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        with Board(folder.path, sitting.step, here.first, wandb, facts) as sitting.board:
            yield from sitting.go()


def base_of(start: Any, id: str, folder: Folder, depth: int, here: World, options: dict[str, Any]) -> Iterator[Event]:
    """The run behind a Start (as the generator's return value), trained now where the cache has none; yields the events of that."""
    place = starts.place_of(start)
    if isinstance(start, RunStart):
        return load_run(place)
    if depth >= starts.DEEPEST:
        raise UserError(f"{id} stands on a chain of more than {starts.DEEPEST} others", "shorten its starts")
    with starts.locked(place) if here.first else nullcontext():
        if not here.leading((place / WEIGHTS).exists):
            yield Noted(id, folder.path, f"{id} stands on {start.from_} ({start.preset}), which is trained once, into {place}")
            yield from train_preset(start.from_, starts.plan_of(start), card_of(start.from_).needs, name=start.preset, out=place, resume=True,
                                    depth=depth + 1, **options)
    here.barrier()
    return load_run(place)


def free_folder(id: str, name: str) -> Path:
    """`runs/<id>-<name>`, or the first of -2, -3 ... that is not there yet."""
    at, number = Path("runs") / f"{id}-{name}", 1
    while at.exists():
        number += 1
        at = Path("runs") / f"{id}-{name}-{number}"
    return at


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)  # noqa: NPY002  (for augmentations of others that draw from it)
    torch.manual_seed(seed)


class Sitting:
    """A run between its start, or resumption, and its end."""

    def __init__(self, id: str, name: str, preset: Preset, needs: tuple[str, ...], folder: Folder, seed: int, here: World,
                 checkpoint_every: int | None, log_every: int, time_budget_s: float | None):
        if log_every < 1 or (checkpoint_every is not None and checkpoint_every < 1) or (time_budget_s is not None and time_budget_s <= 0):
            raise UserError("log_every, checkpoint_every and the time budget are positive", "leave them out for the defaults")
        self.id, self.name, self.preset, self.needs, self.folder, self.seed, self.world = id, name, preset, needs, folder, seed, here
        self.every, self.log_every, self.budget = checkpoint_every, log_every, time_budget_s
        self.total, self.step, self.samples, self.skipped = sum(s.steps for s in preset.stages), 0, 0, 0
        self.notes: list[str] = []
        self.watch, self.health = Watch(), dict[str, float]()
        self.rested, self.cost = time.monotonic(), 0.0
        self.board: Board

    def prepare(self, feeding: Feeding, bases: list[Run]) -> None:
        """Builds the system from the seed, with the weights of its starts, and opens the data; finds the checkpoint to go on from."""
        self.feeding = feeding
        mine = getattr(self.preset.feed.text, "plain", self.preset.feed.text)
        lent = next((r.tokenizer for r in bases if r.tokenizer is not None and r.preset.feed.text == mine), None)
        self.world.leading(lambda: feeding.open(self.folder.keep_tokenizer, lent))
        if not self.world.first:
            feeding.open(self.folder.keep_tokenizer, lent)
        seed_all(self.seed)
        self.system: System = self.preset.config.build()
        for start, run in zip(self.preset.starts, bases):
            starts.carry(start, run, self.system)
        self.system.after_start()
        self.system.to(self.world.device)
        seed_all(self.seed + 1 + self.world.rank)
        self.found = self.world.leading(lambda: checkpoint.latest(self.folder.checkpoints, self.notes.append))
        self.step = self.found.step if self.found else 0
        if self.found and self.found.facts["ranks"] != self.world.size:
            self.notes.append(f"the checkpoint is of {self.found.facts['ranks']} ranks, this is {self.world.size}: the run goes on, not bit for bit")
        if self.world.first:
            self.folder.cut_log(self.step)

    def doubted(self) -> str:
        """What the preflight says; a UserError of its. The stream of the run itself is opened afterwards, from its beginning."""
        few = [s.but(batch_size=min(s.batch_size, SAMPLES)) for s in self.preset.stages]
        return self.world.leading(lambda: preflight(self.system, [
            (stage, self.feeding.stream(smaller, self.seed + 1009 * i, None, World(self.world.device)))
            for i, (stage, smaller) in enumerate(zip(self.preset.stages, few))], self.needs))

    def go(self) -> Iterator[Event]:
        """All stages that are left, then the weights."""
        begun, losses, training = time.monotonic(), dict[str, float](), None
        self.rested = begun
        yield from self.note()
        for number, stage in enumerate(self.preset.stages):
            if self.found and self.found.facts["stage"] > number:
                continue
            training, stream, spent = self.open_stage(number, stage)
            if number == 0 or self.found:
                yield self.started(stage)
            entered = time.monotonic() - spent
            share = self.budget * stage.steps / self.total if self.budget else None
            clock = (lambda share=share, entered=entered: (time.monotonic() - entered) / share) if share else None
            for s in fit(self.system, stage, checked(stream, self.needs), training=training, names=self.feeding.names, clock=clock):
                self.step, losses, self.samples = self.step + 1, s.losses, self.samples + s.samples
                if s.health:
                    self.health = s.health
                    self.notes += [f"step {self.step}: {said}" for said in self.watch.say(s.health)]
                if self.step % self.log_every == 0 or s.index == stage.steps:
                    yield self.logged(stage, s, stream)
                    yield from self.note()
                if s.index < stage.steps and self.due():
                    yield self.save(number, training, stream, time.monotonic() - entered)
            self.found = None
            yield self.save(number, training, stream, time.monotonic() - entered, over=True)
        self.write(training)
        yield Finished(self.id, self.folder.path, self.step, losses, time.monotonic() - begun, self.samples, self.folder.weights)

    def open_stage(self, number: int, stage: Stage) -> tuple[Training, Stream, float]:
        """The stage's state and stream, from the checkpoint where it was saved in this stage, and the seconds already spent in it."""
        training, facts = Training(self.system, stage, self.world), self.found.facts if self.found else {}
        if self.found:
            rest = checkpoint.load_model(self.found, self.system, self.world)
            training.load(rest, facts["index"])
        stream = self.feeding.stream(stage, self.seed + 1009 * number, facts.get("loader"), self.world)
        if self.found:
            checkpoint.restore_random_states(self.found, self.world)
        return training, stream, facts.get("spent", 0.0)

    def started(self, stage: Stage) -> Started:
        everything, trainable = parameters(self.system)
        return Started(self.id, self.folder.path, self.name, self.total, self.step, everything, trainable, self.feeding.size, self.feeding.name,
                       str(self.world.device), resolve(stage.precision, self.world.device), self.world.size)

    def logged(self, stage: Stage, s: Step, stream: Stream) -> Stepped:
        """Writes one line of the log and the board."""
        speed = s.samples / max(s.seconds, 1e-9)
        if len(stream.skipped) > self.skipped:
            name, reason = stream.skipped[-1]
            self.notes.append(f"{len(stream.skipped)} samples could not be read so far, the last is {name} ({reason})")
            self.skipped = len(stream.skipped)
        event = Stepped(self.id, self.folder.path, stage.name, self.step, self.total, s.losses, s.total, s.lr, s.grad_norm, speed, s.seconds,
                        self.skipped)
        if self.world.first:
            self.board.write({"step": self.step, "stage": stage.name, "losses": s.losses, "total": s.total, "lr": s.lr, "grad_norm": s.grad_norm,
                              "samples_per_s": round(speed, 3), "seconds": round(s.seconds, 6), "skipped": self.skipped,
                              **({"health": self.health} if self.health else {})})
        self.health = {}
        return event

    def note(self) -> Iterator[Noted]:
        while self.notes:
            yield Noted(self.id, self.folder.path, self.notes.pop(0))

    def due(self) -> bool:
        """Whether a checkpoint is due: every so many steps, or when the time since the last is 20 times what one costs, and 10 s at least."""
        if self.every:
            return self.step % self.every == 0
        return self.world.agreed(time.monotonic() - self.rested > max(10.0, 20 * self.cost))

    def save(self, number: int, training: Training, stream: Stream, spent: float, over: bool = False) -> Saved:
        """A checkpoint of everything; `over`: the stage is done, what follows is the next."""
        begun = time.monotonic()
        facts = {"stage": number, "index": training.stage.steps if over else training.index, "spent": spent, "loader": stream.state()}
        tensors = {f"model.{k}": v for k, v in self.system.state_dict().items()} | training.tensors()
        path = checkpoint.save(self.folder.checkpoints, self.step, tensors, facts, self.world)
        self.rested, self.cost = time.monotonic(), time.monotonic() - begun
        return Saved(self.id, self.folder.path, self.step, path)

    def write(self, training: Training | None) -> None:
        """weights.safetensors, last of all: its presence says that the run is finished."""
        state = {k: whole_tensor(v).cpu() for k, v in self.system.state_dict().items()}
        averaged = {k: whole_tensor(v).cpu() for k, v in training.average.weights.items()} if training and training.average else {}
        checkpoint.check_finite(state, self.world)
        about = {"format": "pt"}             # no more: safetensors writes several entries in a random order, and equal runs give equal files

        def put() -> None:
            if averaged:
                checkpoint.write_tensors(self.folder.path / AVERAGED, {**state, **averaged}, about)
            if hasattr(self.preset.config, "adapter") and hasattr(self.preset.config, "base"):
                save_adapter(self.folder.path, self.system, self.preset, str(starts.place_of(self.preset.starts[0])))
            checkpoint.write_tensors(self.folder.weights, state, about)

        self.world.leading(put)


def checked(stream: Stream, needs: tuple[str, ...]) -> Iterator[Any]:
    """The batches of a stream, the first one examined against what the system needs."""
    for i, batch in enumerate(stream):
        if i == 0:
            check_batch(batch, needs)
        yield batch


class Board:
    """Where a run's numbers go: log.jsonl, TensorBoard and, where asked, Weights & Biases. Silent on ranks other than the first."""

    def __init__(self, folder: Path, step: int, first: bool, project: str | None, facts: dict[str, Any]):
        self.folder, self.step, self.first, self.project, self.facts = folder, step, first, project, facts

    def __enter__(self) -> "Board":
        self.close: list[Callable[[], Any]] = []
        if self.first:
            with checkpoint.writing(self.folder / "log.jsonl"):
                from torch.utils.tensorboard.writer import SummaryWriter

                self.file = (self.folder / "log.jsonl").open("a", encoding="utf-8", buffering=1)
                self.close.append(self.file.close)
                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1 if self.step else None)
                self.close.append(self.board.close)
            if self.project:
                module = need_extra("wandb", "wandb")
                self.remote = module.init(project=self.project, dir=str(self.folder), config=self.facts, id=self.folder.name, resume="allow")
                self.close.append(self.remote.finish)
        return self

    def write(self, line: dict[str, Any]) -> None:
        with checkpoint.writing(self.folder / "log.jsonl"):
            self.file.write(json.dumps(line) + "\n")
            scalars = {**{f"loss/{k}": v for k, v in line["losses"].items()}, **{f"health/{k}": v for k, v in line.get("health", {}).items()},
                       **{k: line[k] for k in ("total", "lr", "grad_norm", "samples_per_s")}}
            for key, value in scalars.items():
                self.board.add_scalar(key, value, line["step"])
        if self.project:
            self.remote.log(scalars, step=line["step"])

    def __exit__(self, *error: Any) -> None:
        for close in reversed(self.close):
            close()
