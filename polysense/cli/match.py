"""match: does a text belong to a picture, and where in it is it seen?"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json

Model = Annotated[str, typer.Option("-m", "--model", metavar="RUN", help="A run folder, or with --system and --layout a published checkpoint.")]


def match(picture: Annotated[str, typer.Argument(metavar="PICTURE", help="A picture file or address.")],
          texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What it may show, each judged on its own.")],
          model: Model,
          why: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw where the likeliest text is seen.")] = None,
          system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Say how likely each text belongs to a picture, by a system that reads both together, and where it is seen.

    \b
    Examples
      polysense match photo.jpg "a dog on grass" "a cat" -m runs/albef
      polysense match photo.jpg "a red circle" -m runs/albef --why where.png
      polysense match photo.jpg "two people" -m runs/albef --json
    """
    import polysense
    from polysense.app.files import place
    from polysense.cli.out import json_out, note, table

    if "://" not in picture and not Path(picture).is_file():
        raise UserError(f"no file {picture!r}", "check the path")
    pipeline = polysense.open(model, system=system, layout=layout, device=device)
    chance = pipeline.match([picture], texts)[0]
    ranked = sorted(zip(texts, chance.tolist(), strict=True), key=lambda pair: -pair[1])
    if why:
        seen = pipeline.ground(picture, ranked[0][0])
        with place(why) as beside:
            seen.overlay().save(beside, "PNG")
        note(f"wrote {why}: {ranked[0][0]}")
    if as_json:
        json_out({"picture": picture, "texts": [{"text": t, "probability": p} for t, p in ranked], "why": why and str(why)})
        return
    table(("text", "probability"), [(t, f"{p:.3f}") for t, p in ranked], right=("probability",))
