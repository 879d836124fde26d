"""compare: systems, or variants of one, side by side at an equal budget."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polysense.base.errors import UserError
from polysense.cli.systems import Json

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def compare(words: Annotated[list[str], typer.Argument(metavar="SYSTEM... [dotted=value]...", help="Systems, as ID or ID:PRESET, the reference first,"
                                                       " and changes to it such as batch_size=64.")],
            data: Annotated[str, typer.Option(metavar="DATA", help="What all train on; a+b joins. Each part is examined by itself.")],
            budget: Annotated[str | None, typer.Option(metavar="TIME", help="Training time for each: 300s, 10m, 1h.")] = None,
            steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Or: optimiser steps for each.")] = None,
            samples: Annotated[int | None, typer.Option(metavar="N", min=1, help="Or: samples seen by each.")] = None,
            seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Trainings of each; fewer than three say little.")] = 3,
            vary: Annotated[list[str] | None, typer.Option(metavar="FIELD=A,B,C", help="Variants of one system: a dotted field, or "
                                                           "objective=info_nce,sigmoid,ID; may be given several times.")] = None,
            own_towers: Annotated[bool, typer.Option("--own-towers", help="Everybody with the towers of their own preset.")] = False,
            exams: Annotated[str, typer.Option(metavar="A,B", help="Which exams, where system and data have what they ask for.")]
            = "zero_shot,retrieval,linear_probe",
            on: Annotated[str | None, typer.Option(metavar="DATA", help="What all are examined on; a+b joins.  [default: --data]")] = None,
            test_split: Annotated[str, typer.Option(metavar="SPLIT", help="The part that is examined on.")] = "val",
            probe: Annotated[int, typer.Option(metavar="N", min=1, help="Training pictures of a probe at most.")] = 2000,
            points: Annotated[int, typer.Option(metavar="N", min=0, help="Looks at the scores on the way, for the curves.")] = 4,
            untrained: Annotated[bool, typer.Option("--untrained", help="A line more: the first system as it is born.")] = False,
            out: Annotated[Path, typer.Option(metavar="DIR", help="Runs and tables; the same command goes on where it was.")] = Path("compared"),
            device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cuda, mps or cpu.  [default: the first that exists]")] = None,
            workers: Annotated[int | None, typer.Option(metavar="N", min=0, help="Processes that decode pictures.")] = None,
            as_json: Json = False) -> None:
    """Train systems at an equal budget and examine them alike: one table with intervals, learning curves and significance.

    The systems share the towers, pictures and texts, batch size and data order of the first one wherever they work with them; what each keeps of
    its own is said. DIR/compare.html, compare.md and compare.json hold the result. A budget of steps or samples gives the same table again from
    the same seeds; one of time depends on the machine.

    \b
    Examples
      polysense compare clip slip lit --data natural_captions+fashion_products --budget 300s
      polysense compare clip:tiny_vit slip clip --data fashion_products --steps 300 --seeds 3 --out compared/first
      polysense compare clip --vary objective=info_nce,sigmoid --data fashion_products --samples 40000
      polysense compare simclr moco dino --data cifar10 --on cifar10+tiny_imagenet40 --exams knn_probe,linear_probe --steps 400
        --untrained
      polysense compare clip batch_size=64 --vary optim.lr=5e-4,1e-3,2e-3 --data scenes --steps 200 --seeds 1
    """
    from polysense.app.compare import Budget
    from polysense.app.compare import compare as compared
    from polysense.app.compared import cell, order, verdict
    from polysense.base.spec import parse_overrides
    from polysense.cli.out import json_out, note, say, table

    systems, changes = [w for w in words if "=" not in w], parse_overrides([w for w in words if "=" in w])
    chosen = Budget(steps=steps, samples=samples, seconds=seconds(budget) if budget else None)
    result = compared(systems, data, chosen, seeds=seeds, out=out, vary=[part(v) for v in vary or ()], overrides=changes, share=not own_towers,
                      exams=[e.strip() for e in exams.split(",") if e.strip()], on=on, test_split=test_split, probe=probe, points=points,
                      untrained=untrained, device=device, workers=workers, say=note)
    if as_json:
        json_out(result.to_dict() | {"files": [str(out / f"compare.{e}") for e in ("html", "md", "json")]})
        return
    rows = [(r["system"], *(cell(r["scores"].get(s)) for s in result.slots), "–" if r["mean_rank"] is None else f"{r['mean_rank']:.2f}")
            for r in order(result)]
    table(("system", *result.slots, "mean rank"), rows)
    for r in order(result):
        for s in result.slots:
            if said := verdict(r["scores"].get(s)):
                say(f"{r['system']} against {result.facts['reference']}, {s}: {said}")
    say(f"{out / 'compare.html'}")


def seconds(text: str) -> float:
    """300s, 10m, 1h or plain seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        return float(number) * UNITS[unit]
    except ValueError:
        raise UserError(f"--budget {text} is not a time", "write 300s, 10m or 1h; or say --steps or --samples") from None


def part(text: str) -> tuple[str, list[Any]]:
    """"optim.lr=1e-3,2e-3" -> ("optim.lr", [0.001, 0.002]); commas inside brackets belong to a value."""
    from polysense.base.spec import parse_value

    path, eq, rest = text.partition("=")
    if not eq or not path or not rest:
        raise UserError(f"cannot read --vary {text!r}", "write it as optim.lr=1e-3,2e-3")
    values, depth = [""], 0
    for letter in rest:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    return path, [parse_value(v) for v in values]
