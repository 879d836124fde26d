"""merge: an adapter becomes part of the weights that it stands on."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli.systems import Json


def merge(source: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `polysense train --adapt`, or its adapter folder.")],
          target: Annotated[Path, typer.Argument(metavar="DST", help="The run folder to write: a plain one, without adapter.")],
          as_json: Json = False) -> None:
    """Merge an adapter into its base: a run like any other, with the same outputs at the cost of the base alone.

    \b
    Examples
      polysense merge runs/mine runs/merged
      polysense merge runs/mine/adapter runs/merged
      polysense convert runs/merged exported --system clip --layout hf
    """
    import polysense
    from polysense.cli.converting import write_run
    from polysense.cli.out import json_out, say
    from polysense.train.adapting import settled

    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} is already there", "give another place to write to")
    pipeline = polysense.open(source, device="cpu")
    pipeline.preset = settled(pipeline.system, pipeline.preset)
    write_run(pipeline, target, {"system": pipeline.id, "preset": "merged", "overrides": {}, "plan": pipeline.preset.to_dict(), "seed": 0,
                                 "data": pipeline.preset.data, "split": "train", "ranks": 1, "merged": {"from": str(source)}})
    count = sum(p.numel() for p in pipeline.system.parameters())
    json_out({"system": pipeline.id, "from": str(source), "to": str(target), "parameters": count}) if as_json else say(
        f"{target}: {count:,} parameters of {pipeline.id}, the adapter inside")
