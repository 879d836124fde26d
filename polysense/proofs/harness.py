"""Runs a proof and files what came out. A proof is `polysense/proofs/<id>.py` with METRIC, DATA and `run(seed) -> Outcome`.

The verdict is computed here and nowhere else: the system beats a baseline when its mean over the seeds is on the better side of the
baseline's mean, and it beats *the* baseline when it beats all of them; the paired 95 % interval (Student, over seeds) is given beside it.
"""
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from polysense.base.catalogue import card_of
from polysense.base.errors import UserError
from polysense.train.starts import cache_root

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass
class Outcome:
    """What one seed of a proof measured: the system, each baseline, and side observations that decide nothing."""
    system: float
    baselines: dict[str, float]
    notes: dict[str, Any] = field(default_factory=dict)


def machine() -> dict[str, Any]:
    """Processor, cores and torch of this machine, as they belong beside any number."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name)
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def commit() -> str | None:
    """The commit of the source tree, with a + where the tree has changes; None for an installed package."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".") if head else ""
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head + ("+" if dirty else "") or None


def gain(system: list[float], baseline: list[float], higher_is_better: bool) -> dict[str, float | None]:
    """Mean paired gain of the system over a baseline with its 95 % interval (None below two seeds); positive is better."""
    gains = [(s - b) * (1 if higher_is_better else -1) for s, b in zip(system, baseline, strict=True)]
    mean, n = fmean(gains), len(gains)
    if n < 2:
        return {"mean": mean, "low": None, "high": None}
    half = T95.get(n, 1.96) * stdev(gains) / n ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict(outcomes: list[Outcome], higher_is_better: bool) -> dict[str, Any]:
    """The computed part of a proof file: values by seed, gains with intervals, and whether every baseline is beaten."""
    names = list(outcomes[0].baselines)
    system = [o.system for o in outcomes]
    baselines = {name: [o.baselines[name] for o in outcomes] for name in names}
    gains = {name: gain(system, values, higher_is_better) for name, values in baselines.items()}
    return {"system": system, "baselines": baselines, "gains": gains, "beats_baseline": all((g["mean"] or 0) > 0 for g in gains.values()),
            "notes": [o.notes for o in outcomes]}


def sources() -> str:
    """Twelve hex digits of this library's source and of torch's version: what the outcome of a seed depends on."""
    import torch

    met = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        met.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return met.hexdigest()[:12]


def once(proof: Any, name: str, seed: int, folder: Path, say: Callable[[str], None]) -> tuple[Outcome, float]:
    """(what a seed measured, its seconds): run now and kept in `folder`, or as it was kept there. A file that cannot be read counts for nothing."""
    kept = folder / f"{seed}.json"
    try:
        held = json.loads(kept.read_text(encoding="utf-8"))
        outcome, took, said = Outcome(**held["outcome"]), float(held["seconds"]), "kept"
    except (OSError, ValueError, KeyError, TypeError):
        before = time.perf_counter()
        outcome, said = proof.run(seed), "run"
        took = time.perf_counter() - before
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{seed}.{os.getpid()}.part"
        part.write_text(json.dumps({"outcome": asdict(outcome), "seconds": took}) + "\n", encoding="utf-8")
        part.replace(kept)
    against = "  ".join(f"{k} {v:.4g}" for k, v in outcome.baselines.items())
    say(f"{name} seed {seed}: {proof.METRIC} {outcome.system:.4g}  against  {against}  ({took:.0f} s{'' if said == 'run' else ', kept'})")
    return outcome, took


def prove(name: str, seeds: Iterable[int] = (0, 1, 2), out: Path | None = None, say: Callable[[str], None] = print,
          anew: bool = False) -> dict[str, Any]:
    """Run the proof of one system over the seeds and file it as `out/<id>.json` (not filed where `out` is None).

    Every seed is kept in the user's cache when it ends, for as long as neither this library nor torch changes: a run that was stopped goes on with
    the next seed, and seeds may be run beside each other, or on several machines with one cache, and filed together. anew: nothing kept is used.
    Raises UserError for an unknown system or one without a proof. A crash of one seed leaves an older file as it was.
    """
    card, seeds = card_of(name), list(seeds)
    if not seeds:
        raise UserError("a proof needs at least one seed", "say --seed 0")
    if find_spec(f"polysense.proofs.{name}") is None:
        raise UserError(f"{name} has no proof yet", "proofs live in polysense/proofs/<id>.py")
    proof = import_module(f"polysense.proofs.{name}")
    folder, outcomes, seconds = cache_root().parent / "proofs" / name / sources(), list[Outcome](), 0.0
    if anew:
        for seed in seeds:
            (folder / f"{seed}.json").unlink(missing_ok=True)
    for seed in seeds:
        outcome, took = once(proof, name, seed, folder, say)
        outcomes.append(outcome)
        seconds += took
    filed = {"id": card.id, "commit": commit(), "machine": machine(), "data": proof.DATA, "metric": proof.METRIC,
             "higher_is_better": proof.HIGHER_IS_BETTER, "seeds": seeds, **verdict(outcomes, proof.HIGHER_IS_BETTER),
             "seconds": round(seconds, 1)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        part = out / f".{name}.json.part"
        part.write_text(json.dumps(filed, indent=1) + "\n", encoding="utf-8")
        part.replace(out / f"{name}.json")
    return filed
