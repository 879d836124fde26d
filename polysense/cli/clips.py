"""clips: searching videos and sounds by words."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json
from polysense.cli.use import Model, _open


def clips(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of videos or sounds, searched at any depth.")],
          query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for, in words.")],
          model: Model,
          of: Annotated[str, typer.Option("--of", metavar="KIND", help="videos or sounds.")] = "videos",
          count: Annotated[int, typer.Option("-k", "--count", metavar="N", min=1, help="How many.")] = 10,
          system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Find videos or sounds by words. The first search encodes them; later ones read only what is new or changed.

    \b
    Examples
      polysense clips ~/videos "a dog runs after a ball" -m runs/clip_frame_aggregation
      polysense clips ~/videos "cooking" -m downloads/clip-vit-base-patch32 --system clip_frame_aggregation --layout hf
      polysense clips ~/recordings "rain" -m runs/imagebind --of sounds
    """
    from polysense.app.clips import search_clips
    from polysense.cli.out import Bar, json_out, note, table

    pipeline = _open(model, system, layout, device)
    with Bar("encoding", of) as bar:
        found = search_clips(pipeline, folder, query, kind=of, count=count, progress=bar)
    if as_json:
        json_out({"query": query, **found.to_json()})
        return
    table(("", "score", of[:-1]), [(h.rank, f"{h.score:.3f}", h.path) for h in found.hits], right=("", "score"))
    for path, reason in found.skipped[:5]:
        note(f"left out {path}: {reason}")
