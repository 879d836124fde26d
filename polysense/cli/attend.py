"""attend: where a self-supervised tower looks."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.cli.codes import Model, opened
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json


def attend(picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture file.")],
           model: Model,
           out: Annotated[Path, typer.Option(metavar="FILE.png", help="The sheet to write: the picture, the mean of all heads, each head.")] = Path(
               "attention.png"),
           system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Draw where the class token of the last block looks: in DINO's towers it outlines the objects.

    \b
    Examples
      polysense attend photo.jpg -m runs/dino --out looks.png
      polysense attend photo.jpg -m facebook/dino-vits16 --system dino --layout hf
    """
    from polysense.app.files import place
    from polysense.base.errors import UserError
    from polysense.cli.out import json_out, say
    from polysense.pipeline.attention import attention_of, attention_sheet

    if not picture.is_file():
        raise UserError(f"no file {str(picture)!r}", "check the path")
    pipeline = opened(model, system, layout, device)
    sheet = attention_sheet(pipeline, picture)
    with place(out) as beside:
        sheet.save(beside, "PNG")
    maps = attention_of(pipeline, picture)
    if as_json:
        json_out({"picture": str(picture), "out": str(out), "heads": len(maps), "attention": maps.round(6).tolist()})
    else:
        say(f"{len(maps)} heads in {out}: the picture, their mean, each of them")
