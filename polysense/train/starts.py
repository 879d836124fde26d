"""The runs a preset stands on: trained once, kept in the user's cache under the hash of their golden lines, their weights carried over."""
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import Preset, Start
from polysense.base.system import Part, System
from polysense.train.checkpoint import writing
from polysense.train.folder import Run

DEEPEST = 3


def cache_root() -> Path:
    """The folder of cached runs: $POLYSENSE_CACHE, else polysense in the user's cache folder; in it, `runs`."""
    base = os.environ.get("POLYSENSE_CACHE")
    return Path(base).expanduser() / "runs" if base else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "polysense" / "runs"


def key_of(preset: Preset, depth: int = 0) -> str:
    """Twelve hex digits of a preset and of all presets it stands on. Raises UserError where they are more than three deep."""
    if depth > DEEPEST:
        raise UserError(f"a preset stands on a chain of more than {DEEPEST} others", "shorten its starts")
    parts = [preset.digest(), *(key_of(preset_of(s.from_, s.preset), depth + 1) for s in preset.starts)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12] if preset.starts else preset.digest()


def plan_of(start: Start) -> Preset:
    """The preset behind a Start, on other data where it says so."""
    plan = preset_of(start.from_, start.preset)
    return plan.but(data=data) if (data := getattr(start, "data", "")) else plan


def place_of(start: Start) -> Path:
    """Where the run behind a Start is cached, or the folder that it names."""
    if folder := getattr(start, "folder", ""):
        return Path(folder)
    return cache_root() / f"{start.from_}-{start.preset}-{key_of(plan_of(start), 1)}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time trains a cached run; others wait. Without effect where the system has no flock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f".{folder.name}.lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def taken_below(into: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the layers below `into` make of weights that come without what an adapter added to them (`take_over` of each that has one)."""
    ours = set(into.state_dict())
    if ours == weights.keys():
        return weights
    for name, module in into.named_modules():
        if name and hasattr(module, "take_over"):
            mine = {k[len(name) + 1:]: v for k, v in weights.items() if k.startswith(f"{name}.")}
            if mine and mine.keys() != {k[len(name) + 1:] for k in ours if k.startswith(f"{name}.")}:
                weights = {k: v for k, v in weights.items() if not k.startswith(f"{name}.")} | {
                    f"{name}.{k}": v for k, v in module.take_over(mine).items()}
        elif name and name.rpartition(".")[2] in ("virtual", "soft") and not any(k.startswith(f"{name}.") for k in weights):
            weights = weights | {f"{name}.{k}": v for k, v in module.state_dict().items()}
    return weights


def carry(start: Start, run: Run, system: System) -> None:
    """Copies the weights `take` of a run into the module `into` of the system; parts may adapt weights of another size (`Part.adapt`).

    Raises UserError where a name or a shape does not fit.
    """
    said = f"start {start.into or 'system'} <- {start.from_}{'.' + start.take if start.take else ''}"
    inside = [f"{start.take}." if start.take else "", f"{start.into}." if start.into else ""]
    theirs, ours = ({k[len(p):]: v for k, v in s.state_dict().items() if k.startswith(p) or f"{k}." == p}      # a module, or one parameter
                    for p, s in zip(inside, (run.system, system)))
    into = system.get_submodule(start.into) if theirs and ours and "" not in ours else system
    theirs = into.take_over(theirs) if isinstance(into, Part) and theirs else theirs
    theirs = taken_below(into, theirs) if theirs and "" not in ours else theirs
    if not theirs or not ours:
        raise UserError(f"{said}: there is nothing called {start.into if not ours else start.take}", "look at the names of both systems")
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in ours or name not in theirs:
            raise UserError(f"{said}: only {'the run' if name in theirs else 'the system'} has {name}", "their configurations must agree")
        if ours[name].shape != theirs[name].shape:
            path, _, leaf = f"{inside[1]}{name}".rpartition(".")
            owner = system.get_submodule(path)
            theirs[name] = owner.adapt(leaf, theirs[name]) if isinstance(owner, Part) else theirs[name]
        if ours[name].shape != theirs[name].shape:
            raise UserError(f"{said}: {name} is {tuple(theirs[name].shape)}, not {tuple(ours[name].shape)}", "their configurations must agree")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(theirs[name])
