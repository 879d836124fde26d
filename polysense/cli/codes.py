"""reconstruct and codes: pictures as a system sees them, and as the numbers that it makes of them."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json

Model = Annotated[str, typer.Option("-m", "--model", metavar="RUN", help="A run folder, or with --system and --layout a published checkpoint.")]


def reconstruct(pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Picture files, or folders of them.")],
                model: Model,
                out: Annotated[Path, typer.Option(metavar="FILE.png", help="The sheet to write: originals above, reconstructions below; "
                                                "masked models have what they were shown between.")] = Path(
                    "reconstructed.png"),
                seed: Annotated[int, typer.Option(metavar="N", help="What masked models hide is drawn with it.")] = 0,
                system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Draw pictures again out of what a system keeps of them (codes, latents, visible patches), beside the originals.

    \b
    Examples
      polysense reconstruct photo.jpg -m runs/vq_vae --out seen.png
      polysense reconstruct ~/photos -m runs/vq_vae
      polysense reconstruct photo.jpg -m runs/mae --seed 3 --out drawn.png
    """
    import torch
    from PIL import Image

    from polysense.app.files import place
    from polysense.cli.out import json_out, say
    from polysense.pipeline.pictures import covered, to_pictures

    paths, pipeline = found(pictures), opened(model, system, layout, device)
    torch.manual_seed(seed)
    drawn = pipeline.reconstruct(paths)
    torch.manual_seed(seed)
    shown = [covered(pipeline, paths)] if hasattr(pipeline.system, "cover") else []
    seen = to_pictures(pipeline.read_images(paths), pipeline.preset.feed.image)
    width, height = drawn[0].size
    rows = [seen, *shown, drawn]
    sheet = Image.new("RGB", (width * len(paths), len(rows) * height))
    for i, column in enumerate(zip(*rows, strict=True)):
        for row, picture in enumerate(column):
            sheet.paste(picture, (i * width, row * height))
    with place(out) as beside:
        sheet.save(beside, "PNG")
    if as_json:
        json_out({"out": str(out), "pictures": [str(p) for p in paths]})
    else:
        say(f"{len(paths)} pictures in {out}: above as read, below drawn again")


def codes(source: Annotated[list[Path], typer.Argument(metavar="PICTURE...|CODES.npz", help="Pictures or folders of them; or codes, to draw.")],
          model: Model,
          out: Annotated[Path, typer.Option(metavar="CODES.npz|DIR", help="Of pictures: arrays path and codes. Of codes: a folder of PNGs.")],
          system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Turn pictures into the grids of code numbers of an image codec, and such numbers back into pictures.

    \b
    Examples
      polysense codes ~/photos -m runs/vq_vae --out codes.npz
      polysense codes codes.npz -m runs/vq_vae --out drawn/
    """
    import numpy as np

    from polysense.app.files import place
    from polysense.cli.out import json_out, say

    back = len(source) == 1 and source[0].suffix == ".npz"
    paths = [] if back else found(source)
    pipeline = opened(model, system, layout, device)
    if back:
        names, grids = read_codes(source[0])
        drawn = pipeline.decode_codes(grids)
        out.mkdir(parents=True, exist_ok=True)
        for i, (name, picture) in enumerate(zip(names, drawn, strict=True)):
            with place(out / f"{i:05d}-{Path(name).stem}.png") as beside:
                picture.save(beside, "PNG")
        json_out({"out": str(out), "pictures": len(drawn)}) if as_json else say(f"{len(drawn)} pictures in {out}")
        return
    if out.suffix != ".npz":
        raise UserError(f"cannot write codes into {str(out)!r}", "give a name that ends in .npz")
    grids = pipeline.encode_codes(paths)
    with place(out) as beside, beside.open("wb") as file:
        np.savez_compressed(file, path=np.array([str(p) for p in paths]), codes=grids)
    told = {"out": str(out), "pictures": len(paths), "grid": list(grids.shape[1:]), "different": len(np.unique(grids))}
    if as_json:
        json_out(told)
    else:
        say(f"{len(paths)} pictures in {out}: grids of {grids.shape[1]}x{grids.shape[2]}, {told['different']} different codes")


def found(given: list[Path]) -> list[Path]:
    """The picture files among files and folders; UserError where there is none."""
    from polysense.app.files import find_photos

    if absent := next((p for p in given if not p.exists()), None):
        raise UserError(f"no file or folder {str(absent)!r}", "check the path")
    paths = [Path(f) for p in given for f in ([name for name, *_ in find_photos(p)] if p.is_dir() else [p])]
    if not paths:
        raise UserError("there are no pictures", "give picture files, or a folder that has some")
    return paths


def read_codes(path: Path) -> tuple[list[str], Any]:
    """(names, codes) of a file that `codes` wrote."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as held:
            return [str(p) for p in held["path"]], held["codes"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"cannot read codes from {str(path)!r}", "give a file that `polysense codes` wrote") from error


def opened(model: str, system: str | None, layout: str | None, device: str | None) -> Any:
    import polysense

    return polysense.open(model, system=system, layout=layout, device=device)
