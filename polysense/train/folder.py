"""The run folder: what is in it, who may write it, and how it is opened again."""
import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import polysense
from polysense.base.errors import UserError
from polysense.base.plan import Preset
from polysense.base.spec import from_dict
from polysense.base.system import System
from polysense.train import checkpoint
from polysense.train.parallel import World
from polysense.weights.ours import renamed

FORMAT = 1
WEIGHTS, AVERAGED = "weights.safetensors", "weights_ema.safetensors"
SAME = {"system": "system", "plan": "preset or its overrides", "seed": "seed", "data": "data", "split": "split"}

BEFORE_RUN_JSON = {"checkpoints", "preset.txt", ".preset.txt.part", ".run.json.part"}      # what a kill can leave before run.json is there


@dataclass
class Run:
    """A run as it lies on disk, its system built, loaded and in eval mode."""
    id: str
    preset: Preset
    system: System
    tokenizer: Any                           # None where the preset reads no text
    folder: Path
    facts: dict[str, Any]                    # run.json


class Folder:
    """`run.json preset.txt log.jsonl weights.safetensors tokenizer/ checkpoints/ tensorboard/` of one run, as its writer sees them."""

    def __init__(self, path: Path):
        self.path, self.checkpoints, self.log, self.weights = path, path / "checkpoints", path / "log.jsonl", path / WEIGHTS

    def claim(self, facts: dict[str, Any], preset: Preset, resume: bool) -> bool:
        """Makes the folder this run's own; whether it is gone on with. Raises UserError where it belongs to another run or cannot be written.

        Without `resume` the folder must be new or empty; with it, what is in it must come from the same system, plan, seed and data.
        """
        with checkpoint.writing(self.path):
            used = self.path.exists() and any(self.path.iterdir())
            if used and not resume:
                raise UserError(f"{self.path} already holds files", "choose another folder, or go on with that run with --resume")
            begun = used and not (self.path / "run.json").exists() and {p.name for p in self.path.iterdir()} <= BEFORE_RUN_JSON
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        if used and not begun:
            before = read_facts(self.path)
            for key, word in SAME.items():
                if before.get(key) != json.loads(json.dumps(facts[key])):
                    raise UserError(f"{self.path} is a run with another {word}{difference(before.get(key), facts[key])}",
                                    "resume it with what it was started with, or choose another folder")
            return True
        checkpoint.write_text(self.path / "preset.txt", "\n".join(preset.lines()) + "\n")
        versions = {"polysense": polysense.__version__, "torch": torch.__version__, "python": platform.python_version()}
        checkpoint.write_text(self.path / "run.json", json.dumps({"format": FORMAT, **facts, "versions": versions}, indent=1) + "\n")
        return False

    def cut_log(self, step: int) -> None:
        """Drops the lines after `step`, and one that a kill left half-written: the steps that come now write theirs again."""
        kept = []
        if self.log.exists():
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
        checkpoint.write_text(self.log, "".join(kept))

    def keep_tokenizer(self, make: Callable[[], Any], load: Callable[[Path], Any]) -> Any:
        """The run's tokenizer: loaded where a whole one is there, else made and saved in one move."""
        place, part = self.path / "tokenizer", self.path / ".tokenizer.part"
        if not place.is_dir():
            with checkpoint.writing(place):
                made = make()
                part.mkdir(exist_ok=True)
                made.save(part)
                part.rename(place)
        return load(place)


def difference(before: Any, now: Any, path: str = "") -> str:
    """` (config.width: 8 before, 16 now)`: the first place where two plain values differ; empty where they are too different to say."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        pairs = [(f"{path}.{k}".lstrip("."), before[k], now[k]) for k in before]
    elif isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and len(before) == len(now):
        pairs = [(f"{path}.{i}".lstrip("."), a, b) for i, (a, b) in enumerate(zip(before, now))]
    else:
        return f" ({path + ': ' if path else ''}{before!r} before, {now!r} now)" if len(f"{before!r}{now!r}") < 120 else ""
    return next((found for at, a, b in pairs if a != b and (found := difference(a, b, at))), "")


def read_facts(path: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises UserError where there is none or it cannot be read."""
    if not path.is_dir():
        raise UserError(f"no run at {path}", "check the path")
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is not a run folder", "it has no run.json")
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
        assert isinstance(facts, dict) and {"system", "plan", "format"} <= facts.keys()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AssertionError) as error:
        raise UserError(f"{path / 'run.json'} cannot be read", "was it edited?") from error
    if facts["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer polysense", "update polysense")
    return facts


def load_run(folder: str | Path, *, device: str | torch.device = "cpu", averaged: bool = False, preset: Preset | None = None) -> Run:
    """Opens a run folder: the system with its trained weights, in eval mode on `device`, and its tokenizer.

    averaged: the exponential average of the weights (runs with `Stage.ema`). A run that is not finished is opened from its last checkpoint,
    with a warning. preset: in place of the one in run.json, for systems from outside the package. Raises UserError where the folder is not a
    run, holds no weights yet, or weights that do not fit.
    """
    path = Path(folder)
    facts = read_facts(path)
    plan: Preset = preset or from_dict(facts["plan"])
    with torch.random.fork_rng(devices=[]):
        system = plan.config.build()
    file = path / (AVERAGED if averaged else WEIGHTS)
    if (path / WEIGHTS).is_file():
        if not file.is_file():
            raise UserError(f"{path} has no averaged weights", "its preset sets no ema")
        fill(system, load_file(file), str(file))
    else:
        found = checkpoint.latest(path / "checkpoints", warnings.warn)
        if found is None:
            raise UserError(f"{path} holds no weights yet", f"let it train on: polysense train {facts['system']} --out {path} --resume")
        warnings.warn(f"{path} is not finished: opened at step {found.step} of {sum(s.steps for s in plan.stages)}", stacklevel=2)
        rest = checkpoint.load_model(found, system, World())
        if averaged:
            average = {k.removeprefix("ema."): v for k, v in rest.items() if k.startswith("ema.")}
            fill(system, {**system.state_dict(), **average}, str(found.path))
    tokenizer = None
    if plan.feed.text and (path / "tokenizer").is_dir():
        from polysense.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(path / "tokenizer", plan.feed.text)
    return Run(facts["system"], plan, system.to(device).eval(), tokenizer, path, facts)


def fill(system: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Strict load, of names before later renames too; the first name that does not fit is named in a UserError."""
    state = renamed(state)
    ours = system.state_dict()
    wrong = sorted(k for k in ours.keys() | state.keys() if k not in ours or k not in state or ours[k].shape != state[k].shape)
    if wrong:
        k = wrong[0]
        what = "is missing" if k not in state else "is unknown" if k not in ours else f"is {tuple(state[k].shape)}, not {tuple(ours[k].shape)}"
        raise UserError(f"{where} does not fit: {k} {what}", f"{len(wrong)} names differ; was it made by another version or preset?")
    system.load_state_dict(state, strict=True)
