"""data list | get | show: what there is to train on, copies of it, a look at it."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.cli.systems import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Data: what there is, copies of it, a look at it.")

Name = Annotated[str, typer.Argument(metavar="DATA", help="A set's name, a folder, .csv .jsonl .parquet, COCO .json, .tar, hf:NAME; a+b joins.")]
Split = Annotated[str, typer.Option(metavar="SPLIT", help="train, val, test ... as the set calls them; all is everything.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the named sets, what each offers and whether it is on this machine.

    Named sets lie in the folder that the variable POLYSENSE_DATA names.

    \b
    Examples
      polysense data list
      POLYSENSE_DATA=~/sets polysense data list --json
    """
    from dataclasses import asdict

    from polysense.cli.out import json_out, size, table
    from polysense.data import list_sources

    found = list_sources()
    if as_json:
        json_out([asdict(s) for s in found])
        return
    table(("name", "kind", "size", "splits", "offers", "what it is"),
          [(s.name, s.kind, "missing" if s.size is None else size(s.size) if s.size else s.where, " ".join(s.splits),
            " ".join(o for o in s.offers if o not in ("index", "views", "text_mask")), s.says) for s in found], right=("size",))


@app.command()
def show(data: Name, split: Split = "train",
         count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="How many samples to draw.")] = 16,
         seed: Annotated[int, typer.Option(metavar="N", help="Which samples: drawn at random from this seed.")] = 0,
         out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="The contact sheet.  [default: DATA-SPLIT.png]")] = None,
         as_json: Json = False) -> None:
    """Draw samples with their captions on a contact sheet, and print what the set holds.

    \b
    Examples
      polysense data show scenes
      polysense data show fashion_products --split dev -n 24 --out dev.png
      polysense data show "photos.csv?image=path&caption=title"
    """
    from polysense.cli.out import json_out, say
    from polysense.cli.sheets import describe, draw_samples, picked
    from polysense.data import source

    opened = source(data, split)
    said = describe(opened)
    samples, damaged = picked(opened, count, seed)
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in data)[-60:].strip("_")
    path = out or Path(f"{name}-{split}.png")
    said |= {"sheet": None, "damaged": [{"id": b.id, "reason": b.reason} for b in damaged]}
    if any("image" in s for s in samples):
        draw_samples(samples, opened.classes, path)
        said["sheet"] = str(path)
    if as_json:
        json_out(said)
        return
    for key, value in said.items():
        if key not in ("damaged", "samples") and value not in (None, [], (), {}):
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            say(f"{key:>12}  {shown}")
    for bad in damaged:
        say(f"     damaged  {bad}")


@app.command()
def get(data: Name, out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for pictures and metadata.jsonl.")],
        split: Split = "train",
        count: Annotated[int | None, typer.Option("-n", "--count", metavar="N", min=1, help="Only the first so many samples.")] = None,
        as_json: Json = False) -> None:
    """Fetch a set (from the network, an archive, a generator) into a plain folder that --data reads and people can look into.

    \b
    Examples
      polysense data get hf:NAME local/name --split train
      polysense data get scenes scenes-1000 -n 1000
      polysense train clip --data local/name
    """
    from polysense.cli.out import Bar, json_out, note, say
    from polysense.cli.sheets import export
    from polysense.data import source

    with Bar("writing", "samples") as bar:
        written, damaged = export(source(data, split), out, count, bar)
    for bad in damaged[:5]:
        note(f"left out {bad}")
    if as_json:
        json_out({"out": str(out), "written": written, "skipped": [{"id": b.id, "reason": b.reason} for b in damaged]})
    else:
        say(f"{written} samples in {out}" + (f", {len(damaged)} could not be read" if damaged else ""))
