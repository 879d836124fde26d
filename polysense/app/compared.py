"""A comparison as Markdown and as one self-contained HTML page."""
from typing import TYPE_CHECKING, Any

from polysense.app.charts import LINES, line_chart

if TYPE_CHECKING:
    from polysense.app.compare import Comparison

LEVEL = 0.05


def cell(score: dict[str, Any] | None) -> str:
    """0.412 [0.380, 0.445]; a dash for what a system cannot take."""
    return "–" if score is None else f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def verdict(score: dict[str, Any] | None) -> str:
    """+0.031 [+0.008, +0.055], p = 0.012 better; empty for the reference."""
    if score is None or "gap" not in score:
        return ""
    g = score["gap"]
    word = "not told apart" if g["p_holm"] > LEVEL else "better" if g["value"] > 0 else "worse"
    return f"{g['value']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}], p = {g['p_holm']:.3g}, {word}"


def order(c: "Comparison") -> list[dict[str, Any]]:
    """Rows by the mean of their ranks; those that could take nothing last."""
    return sorted(c.table, key=lambda r: (r["mean_rank"] is None, r["mean_rank"]))


def about(c: "Comparison") -> list[str]:
    """What was done, in sentences."""
    f = c.facts
    seeds = f"{len(f['seeds'])} seed{'s' if len(f['seeds']) > 1 else ''}"
    beside = ", and beside them the first one as it is born" if f.get("untrained") else ""
    towers = f"in batches of {f['batch_size']}" if f.get("share", True) else "with the towers and batches of its own preset"
    out = [f"{len(f['systems'])} systems, each trained on {f['data']} for {f['budget']} {towers}, over {seeds}{beside}; "
           f"all saw the same samples in the same order." + (f" All were examined on {f['on']}." if f["on"] != f["data"] else ""),
           f"Gaps are to {f['reference']}, the reference. Intervals are 95 % bootstrap intervals over test pictures and training seeds; "
           "differences are drawn in pairs, on the same pictures and seeds, and p is corrected for the number of systems (Holm).",
           "Optimisers, and whatever else makes a recipe itself, are each recipe's own. What holds at this budget and size need not hold at another."]
    if len(f["seeds"]) < 3:
        out.append("With so few seeds the intervals say little about the chance of training.")
    return out


def markdown(c: "Comparison") -> str:
    lines = ["# Comparison at an equal budget", "", *about(c), ""]
    lines += ["| system | " + " | ".join(c.slots) + " | mean rank |", "|---" * (len(c.slots) + 2) + "|"]
    for row in order(c):
        rank = "–" if row["mean_rank"] is None else f"{row['mean_rank']:.2f}"
        lines.append(f"| {row['system']} | " + " | ".join(cell(row["scores"].get(s)) for s in c.slots) + f" | {rank} |")
    lines += ["", f"## Against {c.facts['reference']}", "", "| system | " + " | ".join(c.slots) + " |", "|---" * (len(c.slots) + 1) + "|"]
    for row in order(c):
        if row["system"] != c.facts["reference"]:
            lines.append(f"| {row['system']} | " + " | ".join(verdict(row["scores"].get(s)) or "–" for s in c.slots) + " |")
    lines += ["", "## What it cost", "", "| system | steps | seconds in steps | samples a second | parameters |", "|---|---|---|---|---|"]
    for row in order(c):
        k = c.costs[row["system"]]
        lines.append(f"| {row['system']} | {k['steps']:,.0f} | {k['seconds']:,.0f} | {k['samples_per_s']:,.0f} | {k['parameters']:,.0f} |")
    for title, said in (("What was done to the pictures", augmentations(c)),
                        ("What is not shared", {k: "; ".join(v) for k, v in c.notes.items()}), ("Left out", c.left_out)):
        if said:
            lines += ["", f"## {title}", "", *(f"- {k}: {v}" for k, v in said.items())]
    return "\n".join(lines) + "\n"


def augmentations(c: "Comparison") -> dict[str, str]:
    """Who saw pictures changed in which way: {systems: views}; one entry for all that saw the same."""
    alike: dict[str, list[str]] = {}
    for label, said in c.facts.get("views", {}).items():
        each = [(v, said.count(v)) for v in dict.fromkeys(said)]
        alike.setdefault("; ".join(v if n == 1 else f"{n} x {v}" for v, n in each), []).append(label)
    return {", ".join(labels): v for v, labels in alike.items()}


def charts(c: "Comparison") -> list[tuple[str, str]]:
    """(title, svg): the scores along the way, at most as many lines in one chart as there are colours, the reference in each."""
    out = []
    for slot, lines in c.curves.items():
        others = [k for k in lines if k != c.facts["reference"]]
        room = len(LINES) - 1
        for start in range(0, max(1, len(others)), room):
            names = [k for k in (c.facts["reference"], *others[start:start + room]) if k in lines]
            if any(lines[k] for k in names):
                out.append((slot, line_chart({k: ([p[0] for p in lines[k]], [p[1] for p in lines[k]]) for k in names}, size=(6.4, 3.2))))
    return out


def html(c: "Comparison") -> str:
    from polysense.app.report import environment

    table = []
    for row in order(c):
        cells = []
        for slot in c.slots:
            score = row["scores"].get(slot)
            bar = None if score is None else {k: round(100 * score[k], 2) for k in ("value", "low", "high")} | {
                "chance": None if score["chance"] is None else round(100 * score["chance"], 2)}
            each = ", ".join(f"{v:.3f}" for v in score["seeds"]) if score else ""
            cells.append({"text": cell(score), "verdict": verdict(score), "bar": bar, "seeds": each})
        rank = "–" if row["mean_rank"] is None else f"{row['mean_rank']:.2f}"
        table.append({"system": row["system"], "cells": cells, "rank": rank, "cost": c.costs[row["system"]], "notes": c.notes.get(row["system"], [])})
    losses = [(name, line_chart({name: (x, y)}, smooth=True, size=(4.2, 2.1))) for name, (x, y) in c.losses.items()]
    return environment().get_template("compare.html").render(c=c, facts=c.facts, about=about(c), table=table, charts=charts(c), losses=losses,
                                                             augmentations=augmentations(c))
