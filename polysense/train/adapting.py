"""`--adapt`: a mechanism of the catalogue put onto any system, trained, and kept by itself beside the run.

`adapted(id, preset, plan, "lora:rank=8,on=vision.*.q|v")` is a preset whose system is the base with the adapter on it; its Start brings the base: a
run that is named, or the preset's own, trained once and cached. A finished run holds `adapter/` with adapter_config.json and
adapter_model.safetensors; such a folder is opened with the base that it names (`open_adapter`), which must still be the one it was trained on.
"""
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polysense.base.catalogue import catalogue, load
from polysense.base.errors import UserError
from polysense.base.plan import Preset, Start
from polysense.base.spec import from_dict, parse_value
from polysense.train.folder import Run, load_run, read_facts
from polysense.weights.files import read_json, read_state, write_files

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
OURS = "polysense"                           # the key of adapter_config.json under which ours stands


@dataclass(frozen=True, kw_only=True)
class RunStart(Start):
    """Weights of a run folder, in place of the cached run of a preset."""
    folder: str


def mechanisms() -> list[str]:
    """Ids of the rows that can be put onto other systems."""
    return [c.id for c in catalogue().values() if c.family == "adapt"]


def parse(text: str) -> Any:
    """`lora:rank=8,on="vision.*.q|v"` -> the adapter's configuration. UserError for an unknown mechanism or field."""
    name, _, rest = text.partition(":")
    if name not in mechanisms():
        raise UserError(f"{name!r} cannot be put onto a system", f"--adapt takes {', '.join(mechanisms())}")
    changes = {}
    for word in re.split(r",(?=\w+=)", rest) if rest else []:
        key, eq, value = word.partition("=")
        if not eq or not key:
            raise UserError(f"cannot read {word!r} of --adapt {text}", 'write it as lora:rank=8,on="vision.*.q|v"')
        changes[key] = parse_value(value)
    kind = load(name).adapter
    return kind().but(**changes)


def adapted(id: str, name: str, plan: Preset, text: str, base: str | Path | None = None) -> Preset:
    """The plan with the mechanism of `text` on its system. base: a run of the same system, whose configuration and way of reading are then kept."""
    adapter = parse(text)
    if base is None:
        return adapter.onto(plan, Start(into="", from_=id, preset=name))
    folder = Path(base).expanduser().absolute()
    facts = read_facts(folder)
    if facts["system"] != id:
        raise UserError(f"{folder} is a run of {facts['system']}, not of {id}", f"adapt it as such: polysense train {facts['system']} --adapt ...")
    whole: Preset = from_dict(facts["plan"])
    return adapter.onto(plan.but(config=whole.config, feed=whole.feed), RunStart(into="", from_=id, preset=facts["preset"], folder=str(folder)))


def standing(id: str, plan: Preset, base: str | Path) -> Preset:
    """The plan of a system that stands on another one (CoOp on CLIP), on a run of yours in place of the one that its Start would train."""
    recipe, folder = load(id), Path(base).expanduser().absolute()
    if not hasattr(recipe, "onto"):
        raise UserError(f"{id} does not stand on a run", "--base is what --adapt goes onto, or what coop stands on; to train on with all "
                        "weights, see --resume")
    facts = read_facts(folder)
    start = RunStart(into="", from_=facts["system"], preset=facts["preset"], folder=str(folder))
    return recipe.onto(plan, from_dict(facts["plan"]), start)


def brought(plan: Preset, said: Iterable[str]) -> Preset:
    """The plan with parts that begin as those of runs of yours.

    said: "vision=runs/clip:vision" lets the part `vision` begin as the part `vision` of that run, "vision=runs/tower" as its whole system,
    "=runs/mine" the whole system as that of a run; each takes the place of the Start of the same part, if the plan has one. Raises UserError for
    what is no run; whether names and shapes fit shows when the system is built.
    """
    starts = {s.into: s for s in plan.starts}
    for text in said:
        into, eq, rest = text.partition("=")
        if not eq or not rest:
            raise UserError(f"cannot read {text!r} of --begin", "write PART=RUN or PART=RUN:ITS_PART, as in vision=runs/clip:vision")
        where, take = rest, ""
        if not Path(rest).expanduser().is_dir() and ":" in rest:
            where, _, take = rest.rpartition(":")
        folder = Path(where).expanduser().absolute()
        facts = read_facts(folder)
        starts[into] = RunStart(into=into, from_=facts["system"], take=take, preset=facts["preset"], folder=str(folder))
    return plan.but(starts=tuple(starts.values()))


def fingerprint(system: nn.Module, but: Iterable[str]) -> str:
    """Sixteen hex digits of everything in a system that its adapter does not hold: names, shapes, bytes."""
    h, left = hashlib.blake2b(digest_size=8), set(but)
    for name, value in sorted(system.state_dict().items()):
        if name not in left:
            h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def held(system: Any, stages: Iterable[Any]) -> set[str]:
    """Names of the parameters that the stages train: what the adapter holds."""
    from fnmatch import fnmatch

    wanted = [p for s in stages for p in s.trainable]
    return {n for n, _ in system.named_parameters() if any(fnmatch(n, p) for p in wanted)}


def save_adapter(folder: Path, system: Any, preset: Preset, where: str) -> None:
    """Writes `folder/adapter/`: nothing of the base but its fingerprint and where it lay."""
    adapter: Any = preset.config.adapter  # type: ignore[attr-defined]
    try:
        about = adapter.about(system)
    except UserError as error:                           # what peft cannot say is in the run itself
        about = {"peft_type": None, "why": str(error)}
    ours = {"plan": preset.to_dict(), "base": where, "fingerprint": fingerprint(system, held(system, preset.stages))}
    write_files(folder / FOLDER, {CONFIG: about | {"base_model_name_or_path": where, OURS: ours}}, {WEIGHTS: adapter.tensors(system)})


def open_adapter(folder: str | Path, base: str | Path | None = None) -> Run:
    """A base with the adapter of a folder on it. base: its run, where it lies elsewhere by now. UserError where the base is another one."""
    place = Path(folder)
    config = read_json(place / CONFIG)
    if OURS not in config:
        raise UserError(f"{place} is an adapter that polysense did not write", "load it onto an adapted system: `config.load(system, tensors)`")
    ours = config[OURS]
    plan: Preset = from_dict(ours["plan"])
    run = load_run(base or ours["base"])
    adapter: Any = plan.config.adapter  # type: ignore[attr-defined]
    system: Any = plan.config.build()
    from polysense.train.starts import carry

    carry(plan.starts[0], run, system)
    system.after_start()
    if fingerprint(system, held(system, plan.stages)) != ours["fingerprint"]:
        raise UserError(f"{run.folder} is not the base that {place} was trained on", "give the right one with base=")
    adapter.load(system, read_state(place / WEIGHTS))
    return Run(run.id, plan, system.eval(), run.tokenizer, place, run.facts)


def settled(system: Any, preset: Preset) -> Preset:
    """Merges the adapter of a system into its weights, in place; the preset of what is left. UserError where there is none, or it cannot be."""
    adapter = getattr(preset.config, "adapter", None)
    base = getattr(preset.config, "base", None)
    if adapter is None or base is None:
        raise UserError("this run has no adapter", "only runs of `polysense train --adapt` can be merged")
    adapter.settle(system)
    return preset.but(config=base, starts=(), stages=tuple(s.but(trainable=("*",)) for s in preset.stages))
