"""render: views of a learned scene."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json
from polysense.cli.use import Model


def render(model: Model,
           turn: Annotated[int, typer.Option(metavar="N", min=1, help="So many views around the scene.")] = 8,
           out: Annotated[Path, typer.Option(metavar="FILE", help=".png: all views on a sheet; .gif: as a film.")] = Path("render.png"),
           size: Annotated[int, typer.Option(metavar="PIXELS", min=2, help="Width and height of a view.")] = 100,
           elevation: Annotated[float, typer.Option(metavar="DEGREES", help="Height of the camera above the horizon.")] = 30.0,
           start: Annotated[float, typer.Option(metavar="DEGREES", help="Where the turn begins.")] = 0.0,
           distance: Annotated[float | None, typer.Option(metavar="D", help="Of the camera from the middle.  [default: the system's]")] = None,
           system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Walk around a scene that was learned from photographs.

    \b
    Examples
      polysense train nerf --out runs/nerf
      polysense render -m runs/nerf --turn 8 --out views.png
      polysense render -m runs/nerf --turn 24 --elevation 45 --size 200 --out around.gif
    """
    if out.suffix.lower() not in (".png", ".gif"):
        raise UserError(f"cannot write views as {out.suffix or out.name!r}", "use .png or .gif")
    if not out.parent.is_dir():
        raise UserError(f"no folder {str(out.parent)!r}", "make it first")
    from polysense.cli.out import json_out, say
    from polysense.cli.use import _open
    from polysense.pipeline.scene import sheet

    views = _open(model, system, layout, device).render(turn, elevation=elevation, size=size, start=start, distance=distance)
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    if out.suffix.lower() == ".gif":
        views[0].save(part, save_all=True, append_images=views[1:], duration=100, loop=0)
    else:
        sheet(views).save(part)
    part.replace(out)
    if as_json:
        json_out({"out": str(out), "views": len(views), "size": [size, size], "elevation": elevation})
    else:
        say(f"{len(views)} views in {out}")
