"""The form that the benches of this folder file their numbers in: docs/speed.md is made of it (scripts/gen_docs.py)."""
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from polysense.proofs.harness import commit, machine

PROOFS = Path(__file__).parents[1] / "docs" / "proofs"


def goal(measured: float, *, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    """A number that was to be reached: at least `least`, or at most `most`."""
    limits = {k: v for k, v in (("least", least), ("most", most)) if v is not None}
    return {"measured": measured, **limits, "reached": (least is None or measured >= least) and (most is None or measured <= most)}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in times.items()}


def write(path: Path | None, *, what: str, settings: dict[str, Any], seconds: dict[str, float], ratios: dict[str, float],
          goals: dict[str, dict[str, Any]], notes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Prints what was measured and files it. what: the unit of `seconds` and which ratios are good. notes: numbers that decide nothing."""
    filed = {"what": what, "commit": commit(), "machine": machine(), "load": os.getloadavg()[0], "settings": settings, "seconds": seconds,
             "ratios": ratios, "goals": goals, "notes": notes or {}}
    print(json.dumps(filed, indent=1))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(filed, indent=1) + "\n", encoding="utf-8")
    return filed
