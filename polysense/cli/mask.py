"""segment, detect: outlines and boxes of things in one picture."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json
from polysense.cli.use import Model

Photo = Annotated[str, typer.Argument(metavar="PHOTO", help="A picture: a file or an http address.")]


def segment(photo: Photo, model: Model,
            point: Annotated[list[str] | None, typer.Option(metavar="X,Y", help="A place inside the thing, as fractions of width and height; may be "
                                                            "given several times.")] = None,
            outside: Annotated[list[str] | None, typer.Option(metavar="X,Y", help="A place that does not belong to it.")] = None,
            box: Annotated[str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="A box around the thing.")] = None,
            text: Annotated[str | None, typer.Option(metavar="TEXT", help="What it is, in words (systems that read them).")] = None,
            out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture with the outline drawn in.")] = Path("segment.png"),
            mask: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write the mask alone too, white on black.")] = None,
            pixels: Annotated[bool, typer.Option("--pixels", help="Places are given in pixels.")] = False,
            system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Draw the outline of one thing: click on it, box it in, or say what it is.

    \b
    Examples
      polysense segment dog.jpg -m runs/sam --point 0.4,0.6 --out dog.png
      polysense segment dog.jpg -m runs/sam --box 120,80,480,400 --pixels
      polysense segment dog.jpg -m runs/sam --point 0.4,0.6 --outside 0.9,0.1 --mask mask.png --json
    """
    for path in (out, mask):
        png(path)
    asked = [(numbers(p, 2, "--point", "X,Y"), 1) for p in point or []] + [(numbers(p, 2, "--outside", "X,Y"), 0) for p in outside or []]
    corners = numbers(box, 4, "--box", "X0,Y0,X1,Y1") if box else None
    from polysense.cli.out import json_out, note, say
    from polysense.cli.use import _open
    from polysense.data.images import decode

    picture = decode(photo)
    if pixels:
        w, h = picture.size
        asked = [((x / w, y / h), k) for (x, y), k in asked]
        corners = tuple(v / s for v, s in zip(corners, (w, h, w, h), strict=True)) if corners else None
    got = _open(model, system, layout, device).segment(picture, points=[p for p, _ in asked], labels=[k for _, k in asked], box=corners, text=text)
    save(got.overlay(), out)
    note(f"wrote {out}")
    if mask:
        from PIL import Image

        save(Image.fromarray(got.mask), mask)
        note(f"wrote {mask}")
    told = got.to_json()
    if as_json:
        json_out({"photo": photo, "out": str(out), **told})
        return
    for i, m in enumerate(told["masks"]):
        say(f"{'best' if not i else 'or  '}  predicted IoU {m['score']:.2f}, {100 * m['share']:.1f} % of the picture")


def detect(photo: Photo, model: Model,
           labels: Annotated[Path | None, typer.Option(metavar="FILE", help="A text file with one label a line.")] = None,
           label: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A label; may be given several times.")] = None,
           out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the boxes into the picture.")] = None,
           threshold: Annotated[float, typer.Option(metavar="P", min=0, max=1, help="Least probability.")] = 0.5,
           top: Annotated[int, typer.Option(metavar="N", min=1, help="How many boxes at most.")] = 100,
           keypoints: Annotated[bool, typer.Option("--keypoints", help="Mark the parts of what is found as well (systems that do).")] = False,
           system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Find things: any words with a system that compares pictures and texts, its own classes with one that detects.

    \b
    Examples
      polysense detect street.jpg -m runs/clip --label "a dog" --label "a car" --out found.png
      polysense detect street.jpg -m runs/clip --labels labels.txt --json
      polysense detect scene.png -m runs/pix2seq_v2 --threshold 0.3
      polysense detect scene.png -m runs/pix2seq_v2 --keypoints --out marked.png --json
    """
    png(out)
    if labels is not None and not labels.is_file():
        raise UserError(f"no file {str(labels)!r}", "write one label a line into it")
    from polysense.cli.out import json_out, note, say, table
    from polysense.cli.use import _open
    from polysense.data.images import decode

    names = [*(label or []), *(line.strip() for line in (labels.read_text(encoding="utf-8").splitlines() if labels else []) if line.strip())]
    picture = decode(photo)
    pipeline = _open(model, system, layout, device)
    if keypoints and not pipeline.can("keypoints"):
        raise UserError(f"{pipeline.id or 'this system'} marks no key points", "leave --keypoints out")
    found = pipeline.detect(picture, names or None, threshold=threshold, top=top)
    found = pipeline.keypoints(picture, found) if keypoints else found
    if out:
        from polysense.pipeline.mask import boxed

        save(boxed(picture, found), out)
        note(f"wrote {out}")
    if as_json:
        json_out({"photo": photo, "found": [d.to_json() for d in found]})
    elif found:
        table(("label", "score", "box"), [(d.label, f"{d.score:.3f}", " ".join(f"{v:.3f}" for v in d.box)) for d in found], right=("score",))
    else:
        say(f"nothing found with a probability of {threshold:g} or more")


def numbers(text: str, count: int, option: str, form: str) -> tuple[float, ...]:
    """"0.4,0.6" -> (0.4, 0.6)."""
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise UserError(f"cannot read {option} {text!r}", f"it looks like {form}")
    return values


def png(path: Path | None) -> None:
    """Refuses, before any work, a picture that cannot be written."""
    if path is not None and path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"cannot write a picture as {path.suffix or path.name!r}", "use .png")
    if path is not None and not path.parent.is_dir():
        raise UserError(f"no folder {str(path.parent)!r}", "make it first")


def save(picture, path: Path) -> None:  # type: ignore[no-untyped-def]
    """Whole or not at all."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    picture.save(part)
    part.replace(path)
