"""Systems side by side at an equal budget: the same towers, data order and budget for each, the same exams for all, one table.

    result = compare(("clip", "slip", "lit"), "natural_captions+fashion_products", Budget(steps=300), out="compared")
    result.table, result.markdown(), result.write("compared")

Each system is trained once for every seed, into `out/runs/LABEL-sSEED`, through the ordinary run: a comparison that was cut short goes on where
it was, and what is finished is not trained again. A budget of steps or samples gives the same table from the same seeds; one of seconds does not,
as machines are not equally fast every day.
"""
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polysense.app.entrants import Budget, Entrant, line_up, views
from polysense.app.files import place
from polysense.base.errors import UserError
from polysense.base.protocols import fulfils
from polysense.tasks import EXAMS, exam_of, take
from polysense.tasks.encode import encode_all_images
from polysense.tasks.result import Result, Units, holm, paired

__all__ = ["Budget", "Comparison", "compare"]

CHOSEN = ("zero_shot", "retrieval", "linear_probe")
FORM = 3                                             # of that file: what an older one lacks is worked out again
KEPT = "compared.json"                               # in a run's folder: its exams with their units, and its learning curve
Say = Callable[[str], object]


class Stopped(UserError):
    """A run that had begun cannot go on."""


@dataclass(frozen=True)
class Slot:
    """One column: an exam on one of the joined data sets."""
    exam: str
    data: str
    split: str

    def __str__(self) -> str:
        return f"{self.exam.replace('_', ' ')}, {self.data}"


@dataclass
class Comparison:
    """What came out. `table` and `curves` are what the same seeds give again; `costs` and `facts` depend on the machine and the day."""
    facts: dict[str, Any]
    slots: list[str]
    table: list[dict[str, Any]]
    curves: dict[str, Any]
    costs: dict[str, dict[str, float]]
    left_out: dict[str, str]
    notes: dict[str, list[str]]
    losses: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "slots": self.slots, "table": self.table, "curves": self.curves, "costs": self.costs,
                "left_out": self.left_out, "notes": self.notes, "losses": self.losses}

    def markdown(self) -> str:
        from polysense.app.compared import markdown

        return markdown(self)

    def html(self) -> str:
        from polysense.app.compared import html

        return html(self)

    def write(self, folder: str | Path) -> list[Path]:
        """compare.json, compare.md and compare.html in `folder`, each in one move; returns their paths."""
        texts = {"compare.json": json.dumps(self.to_dict(), indent=1) + "\n", "compare.md": self.markdown(), "compare.html": self.html()}
        for name, text in texts.items():
            with place(Path(folder) / name) as beside:
                beside.write_text(text, encoding="utf-8")
        return [Path(folder) / name for name in texts]


def compare(systems: Sequence[str], data: str, budget: Budget, *, seeds: int | Sequence[int] = 3, out: str | Path,
            vary: Sequence[tuple[str, Sequence[Any]]] = (), overrides: dict[str, Any] | None = None, share: bool = True,
            exams: Sequence[str] = CHOSEN, on: str | None = None, split: str = "train", test_split: str = "val", probe: int = 2000, points: int = 4,
            untrained: bool = False, device: str | None = None, workers: int | None = None, say: Say = lambda text: None) -> Comparison:
    """Trains and examines every system and writes the comparison into `out`.

    systems: ids, or id:preset; the first is the reference that others are tested against and whose towers they share. data: sources joined by "+";
    each is examined on its own `test_split`. on: other sources to examine on, joined alike. vary: (dotted field or "objective", values) pairs of
    one system. overrides: dotted changes for the reference and for whoever has such a field. share=False: everybody with their own towers. probe:
    training pictures of a probe at most. points: how often the learning curve is looked at. untrained: a line more, the reference with the weights it
    is born with, which says what the exams give for features that nobody trained. Raises UserError where fewer than two systems can take
    part.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise UserError("a comparison needs at least one seed", "say seeds=1, or better 3")
    asked = [exam_of(e).name for e in exams]
    entrants = line_up(systems, data, budget, vary=vary, overrides=overrides, share=share, split=split)
    first = next(e for e in entrants if not e.why)
    if untrained:
        entrants.append(Entrant(f"{first.label}, untrained", first.id, first.preset, first.plan, first.changes, trained=False))
    fit = [e for e in entrants if not e.why]
    for e in entrants:
        for note in ([f"left out: {e.why}"] if e.why else e.notes):
            say(f"{e.label}: {note}")
    field_ = Field(on or data, split, test_split, asked, probe)
    folder = Path(out)
    met: dict[str, list[dict[str, Any]]] = {e.label: [] for e in fit}
    for n, (seed, e) in enumerate((s, e) for s in numbers for e in fit):         # seed by seed, so that a stopped comparison is a fair one
        if e.why:
            continue
        say(f"[{n + 1}/{len(fit) * len(numbers)}] {e.label}, seed {seed}" + (f": {budget}" if e.trained else ""))
        try:
            own, firsts = (folder / "runs" / f"{safe(x.label)}-s{seed}" for x in (e, first))
            met[e.label].append(one_run(e, own, firsts, seed, budget, field_, points, device, workers, say))
        except Stopped as error:                         # the others go on without it; without the reference there is nothing to compare with
            if e is fit[0]:
                raise
            e.why = f"seed {seed} stopped: {error}"
            say(f"{e.label}: left out: {e.why}")
    fit = [e for e in fit if not e.why]
    met = {e.label: met[e.label] for e in fit}
    if sum(e.trained for e in fit) < 2:
        raise UserError("nobody is left to compare with the reference", "see above what stopped the others")
    facts = {"of": " ".join(systems), "systems": [e.label for e in fit if e.trained], "reference": fit[0].label,
             "data": data, "on": on or data, "split": split,
             "budget": str(budget), "seeds": numbers, "exams": asked, "probe": probe, "changes": overrides or {},
             "vary": [[k, list(v)] for k, v in vary], "batch_size": fit[0].plan.stages[0].batch_size,
             "untrained": untrained, "share": share, "views": {e.label: views(e.plan.feed) for e in fit if e.trained},
             "plans": {e.label: e.plan.digest() for e in fit if e.trained}, **about()}
    result = Comparison(facts, [str(s) for s in field_.slots], rows(fit, field_.slots, met), {}, costs(met),
                        {e.label: e.why for e in entrants if e.why}, {e.label: e.notes for e in fit if e.notes})
    result.curves = curves(met)
    result.losses = {e.label: met[e.label][0]["losses"] for e in fit if e.trained}
    result.write(folder)
    return result


def about() -> dict[str, Any]:
    import platform

    import torch

    import polysense

    return {"versions": {"polysense": polysense.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "cores": os.cpu_count(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def safe(label: str) -> str:
    return "".join(c if c.isalnum() or c in "._-=" else "_" for c in label)[-100:]


# -- training and examining one --------------------------------------------------------------------------------------------------------------

class Field:
    """The exams and what they are taken on, opened once for everybody."""

    def __init__(self, data: str, split: str, test_split: str, exams: Sequence[str], probe: int):
        from polysense.data import source

        self.probe, self.tests, self.trains, self.slots = probe, dict[str, Any](), dict[str, Any](), list[Slot]()
        for name in data.split("+") if not Path(data).exists() else [data]:
            test = source(name, test_split)
            able = [e for e in exams if all(k in test.offers for k in EXAMS[e].needs)]
            if able:
                self.tests[name], self.trains[name] = test, few(source(name, split), probe)
                self.slots += [Slot(e, name, test.split) for e in able]
        if not self.slots:
            raise UserError(f"none of the exams {', '.join(exams)} can be taken on {data}", "choose data with captions or labels")

    @property
    def settings(self) -> dict[str, Any]:
        return {"slots": [str(s) for s in self.slots], "splits": [s.split for s in self.slots], "probe": self.probe,
                "sizes": {k: len(v) for k, v in self.tests.items()}}


def few(source: Any, most: int) -> Any:
    """At most so many samples, evenly spread."""
    from polysense.data.sources import Subset

    return source if len(source) <= most else Subset(source, [i * len(source) // most for i in range(most)])


def one_run(e: Entrant, folder: Path, firsts: Path, seed: int, budget: Budget, field_: Field, points: int, device: str | None,
            workers: int | None, say: Say) -> dict[str, Any]:
    """Trains where needed, examines where needed; {exams: {slot: {metric, value, chance, n, total, size}}, curve, losses, cost}.

    firsts: the run of the reference with this seed, whose system is built anew where nothing is trained.
    """
    kept = folder / KEPT
    settings = {**field_.settings, "form": FORM, "points": points, "digest": e.plan.digest()}
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["settings"] == settings:
            return before
    import polysense
    from polysense.tasks.probes import untrained

    if e.trained:
        trained(e, folder, seed, budget, points, device, workers, say)
        pipeline = polysense.open(folder, device=device)
    else:
        pipeline = untrained(polysense.open(firsts, device=device), seed)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()] if e.trained else []
    steps = log[-1]["step"] if log else 0
    said = {"settings": settings, "exams": examined(pipeline, field_), "curve": curve(pipeline, folder, log, field_),
            "losses": ([s["step"] for s in log], [s["total"] for s in log]),
            "cost": {"steps": steps, "samples": steps * e.plan.stages[0].batch_size,
                     "seconds": sum(s["seconds"] for s in log), "parameters": sum(p.numel() for p in pipeline.system.parameters())}}
    with place(kept) as beside:
        beside.write_text(json.dumps(said) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "curve", ignore_errors=True)
    return said


def trained(e: Entrant, folder: Path, seed: int, budget: Budget, points: int, device: str | None, workers: int | None, say: Say) -> None:
    """The run, gone on with where it was; weights on the way are kept in `curve/` until they are examined."""
    from polysense.train.checkpoint import TENSORS
    from polysense.train.events import Noted, Saved
    from polysense.train.run import train_preset

    total = sum(s.steps for s in e.plan.stages)
    every = max(1, round(total / (points + 1))) if budget.seconds is None else None
    events, begun = train_preset(e.id, e.plan, e.needs, name=e.preset, out=folder, seed=seed, resume=True, overrides=e.changes, device=device,
                                 workers=workers, checkpoint_every=every, time_budget_s=budget.seconds), False
    try:
        for event in events:
            begun = True
            if isinstance(event, Saved) and event.folder == folder and (event.path / TENSORS).is_file():
                (folder / "curve").mkdir(exist_ok=True)
                copy(event.path / TENSORS, folder / "curve" / f"{event.step:09d}.safetensors")
            elif isinstance(event, Noted):
                say(event.text)
    except UserError as error:
        if not begun:                                    # a folder of another run, say: nothing that leaving one out would mend
            raise
        raise Stopped(error.what, error.advice) from error


def copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)                          # a checkpoint is never written into, only replaced
    except OSError:
        shutil.copyfile(source, target)


def examined(pipeline: Any, field_: Field, only: Sequence[Slot] | None = None) -> dict[str, Any]:
    """Every slot that the system has the capabilities for; pictures are encoded once for each data set."""
    out, seen, learnt = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for slot in field_.slots if only is None else only:
        exam = EXAMS[slot.exam]
        if not all(fulfils(pipeline.system, c) for c in exam.asks):
            continue
        if exam.reads != "features":
            out[str(slot)] = plain(take(slot.exam, pipeline, field_.tests[slot.data], field_.trains[slot.data]))
            continue
        if slot.data not in seen:
            seen[slot.data] = encode_all_images(pipeline, field_.tests[slot.data])
        if exam.trains and slot.data not in learnt:
            learnt[slot.data] = encode_all_images(pipeline, field_.trains[slot.data])
        out[str(slot)] = plain(take(slot.exam, pipeline, seen[slot.data], learnt[slot.data] if exam.trains else None))
    return out


def plain(result: Result) -> dict[str, Any]:
    if result.units is None:
        raise UserError(f"{result.exam} does not say what it measured picture by picture", f"compare by {', '.join(CHOSEN)}")
    return {"metric": next(iter(result.metrics)), "value": result.value, "chance": result.chance, "n": result.n,
            "total": result.units.total.tolist(), "size": result.units.size.tolist()}


def curve(pipeline: Any, folder: Path, log: list[dict[str, Any]], field_: Field) -> dict[str, Any]:
    """The first slot of each exam that needs no training, at the weights kept on the way: {slot: [[step, seconds, value], ...]}."""
    from safetensors.torch import load_file

    slots = [s for s in field_.slots if not EXAMS[s.exam].trains]
    spent = np.cumsum([s["seconds"] for s in log])
    out: dict[str, Any] = {}
    for path in sorted((folder / "curve").glob("*.safetensors")):
        state = load_file(path)
        weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        weights |= {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
        pipeline.system.load_state_dict(weights)
        step = int(path.stem)
        at = next((i for i, s in enumerate(log) if s["step"] >= step), len(log) - 1)
        for name, said in examined(pipeline, field_, slots).items():
            out.setdefault(name, []).append([step, round(float(spent[at]), 3), said["value"]])
    return out


# -- the table -------------------------------------------------------------------------------------------------------------------------------

def rows(fit: list[Entrant], slots: list[Slot], met: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a system: per slot the mean over seeds with its interval, the values of the seeds, and the gap to the reference with p (Holm over
    the systems of the column); then the mean of its ranks over the slots that all of its rivals could take."""
    table: list[dict[str, Any]] = [{"system": e.label, "scores": {}} for e in fit]
    reference = fit[0].label
    for slot in map(str, slots):
        able = [e for e in fit if all(slot in run["exams"] for run in met[e.label])]
        units = {e.label: [Units(np.array(r["exams"][slot]["total"]), np.array(r["exams"][slot]["size"])) for r in met[e.label]] for e in able}
        gaps = {e.label: paired(units[e.label], units[reference]) for e in able if e.label != reference and reference in units}
        corrected = dict(zip(gaps, holm([g.p for g in gaps.values()])))
        for row in table:
            label = row["system"]
            if label not in units:
                continue
            mean, first = paired(units[label]), met[label][0]["exams"][slot]
            score: dict[str, Any] = {"metric": first["metric"], "value": mean.value, "low": mean.low, "high": mean.high, "chance": first["chance"],
                                     "seeds": [r["exams"][slot]["value"] for r in met[label]], "n": first["n"]}
            if label in gaps:
                g = gaps[label]
                score["gap"] = {"value": g.value, "low": g.low, "high": g.high, "p": g.p, "p_holm": corrected[label]}
            row["scores"][slot] = score
    for row, ranks in zip(table, ranked(table, [str(s) for s in slots])):
        row["ranks"], row["mean_rank"] = ranks, float(np.mean(list(ranks.values()))) if ranks else None
    return table


def ranked(table: list[dict[str, Any]], slots: list[str]) -> Iterator[dict[str, float]]:
    """For each row its rank (1 is best, equals share the middle) in each slot that it sat."""
    values = {s: {r["system"]: r["scores"][s]["value"] for r in table if s in r["scores"]} for s in slots}
    for row in table:
        own = row["system"]
        yield {s: 1 + sum(v > col[own] for v in col.values()) + (sum(v == col[own] for v in col.values()) - 1) / 2
               for s, col in values.items() if own in col}


def curves(met: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """{slot: {system: [[step, mean over seeds], ...]}}, at the steps that all seeds looked at; where there are none, of the first seed."""
    out: dict[str, Any] = {}
    for label, runs in met.items():
        for slot in runs[0]["curve"]:
            by_step = [{p[0]: p[2] for p in r["curve"].get(slot, [])} for r in runs]
            common = sorted(set.intersection(*(set(b) for b in by_step)))
            if not common:                           # under a budget of time no two runs stop at the same step
                common, by_step = sorted(by_step[0]), by_step[:1]
            out.setdefault(slot, {})[label] = [[s, float(np.mean([b[s] for b in by_step]))] for s in common]
    return out


def costs(met: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Means over seeds: steps, samples, seconds in steps, samples a second; and parameters."""
    out = {}
    for label, runs in met.items():
        mean = {k: float(np.mean([r["cost"][k] for r in runs])) for k in ("steps", "samples", "seconds", "parameters")}
        out[label] = {**mean, "samples_per_s": mean["samples"] / max(mean["seconds"], 1e-9)}
    return out
