"""reconstruct, codes, decode: pictures as a system sees them, as the numbers that it makes of them, and back."""
from __future__ import annotations

import json
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

    Says how like they are: PSNR in decibels and SSIM. `polysense exam RUN reconstruction` measures a whole set, with intervals and the use of codes.

    \b
    Examples
      polysense reconstruct photo.jpg -m runs/vq_vae --out seen.png
      polysense reconstruct ~/photos -m runs/vq_vae
      polysense reconstruct photo.jpg -m runs/mae --seed 3 --out drawn.png
    """
    import numpy as np
    import torch
    from PIL import Image

    from polysense.app.files import place
    from polysense.cli.out import json_out, say
    from polysense.pipeline.pictures import covered, to_pictures
    from polysense.tasks.likeness import psnr, ssim

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
    both = [[torch.from_numpy(np.array(picture)) / 255 for picture in pair] for pair in zip(drawn, seen, strict=True)]
    like = {name: [measure(*pair) for pair in both] for name, measure in (("psnr", psnr), ("ssim", ssim))}
    if as_json:
        json_out({"out": str(out), "pictures": [str(p) for p in paths], **{k: [round(v, 4) for v in each] for k, each in like.items()}})
    else:
        mean = {k: sum(each) / len(each) for k, each in like.items()}
        say(f"{len(paths)} pictures in {out}: above as read, below drawn again; PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.3f}")


def codes(source: Annotated[list[Path], typer.Argument(metavar="PICTURE...|CODES", help="Pictures or folders of them; or codes, to draw.")],
          model: Model,
          out: Annotated[Path | None, typer.Option(metavar="CODES.npz|.json|DIR", help="Of pictures: what is written of them, by default JSON to "
                                                   "standard output. Of codes: see decode.")] = None,
          system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Turn pictures into the grids of code numbers of an image codec, as {"path": [...], "codes": [[[...]]]}.

    \b
    Examples
      polysense codes photo.jpg -m runs/vq_vae > ids.json
      polysense codes ~/photos -m runs/vq_vae --out codes.npz
      polysense codes codes.npz -m runs/vq_vae --out drawn/
    """
    import numpy as np

    from polysense.app.files import place
    from polysense.cli.out import json_out, say

    if len(source) == 1 and source[0].suffix in (".npz", ".json"):
        return decode(source[0], model, Path("decoded") if out is None else out, system, layout, device, as_json)
    if out is not None and out.suffix not in (".npz", ".json"):
        raise UserError(f"cannot write codes into {str(out)!r}", "give a name that ends in .npz or .json")
    paths = found(source)
    grids = opened(model, system, layout, device).encode_codes(paths)
    held = {"path": [str(p) for p in paths], "codes": grids.tolist()}
    if out is None:
        print(json.dumps(held))
        return
    with place(out) as beside:
        if out.suffix == ".json":
            beside.write_text(json.dumps(held) + "\n", encoding="utf-8")
        else:
            with beside.open("wb") as file:
                np.savez_compressed(file, path=np.array(held["path"]), codes=grids)
    told = {"out": str(out), "pictures": len(paths), "grid": list(grids.shape[1:]), "different": len(np.unique(grids))}
    if as_json:
        json_out(told)
    else:
        say(f"{len(paths)} pictures in {out}: grids of {grids.shape[1]}x{grids.shape[2]}, {told['different']} different codes")


def decode(source: Annotated[Path, typer.Argument(metavar="CODES", help="What `polysense codes` wrote, .npz or .json; or a JSON file of one "
                                                  "grid of code numbers, or of a list of grids.")],
           model: Model,
           out: Annotated[Path, typer.Option(metavar="FILE.png|DIR", help="One picture; or a folder, of several.")] = Path("decoded"),
           system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Draw pictures from grids of code numbers.

    \b
    Examples
      polysense decode ids.json -m runs/vq_vae --out photo.png
      polysense decode codes.npz -m runs/vq_vae --out drawn/
    """
    from polysense.app.files import place
    from polysense.cli.mask import png
    from polysense.cli.out import json_out, say

    names, grids = read_codes(source)
    if out.suffix:
        png(out)
        if len(names) != 1:
            raise UserError(f"{len(names)} pictures do not fit into {out.name}", "give a folder")
    drawn = opened(model, system, layout, device).decode_codes(grids)
    if not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
    for i, (name, picture) in enumerate(zip(names, drawn, strict=True)):
        with place(out if out.suffix else out / f"{i:05d}-{Path(name).stem}.png") as beside:
            picture.save(beside, {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(out.suffix.lower(), "PNG"))
    json_out({"out": str(out), "pictures": len(drawn)}) if as_json else say(f"{len(drawn)} pictures in {out}")


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
    """(names [N], codes [N,h,w]) of a file that `codes` wrote, or of a JSON file of grids without names."""
    import numpy as np

    if not path.is_file():
        raise UserError(f"no file {str(path)!r}", "check the path")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as held:
                names, grids = [str(p) for p in held["path"]], held["codes"]
        else:
            told = json.loads(path.read_text(encoding="utf-8"))
            grids = np.array(told["codes"] if isinstance(told, dict) else told)
            grids = grids[None] if grids.ndim == 2 else grids
            names = [str(p) for p in told["path"]] if isinstance(told, dict) and "path" in told else ["codes"] * len(grids)
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise UserError(f"cannot read codes from {str(path)!r}", "give a file that `polysense codes` wrote, or a grid of numbers as JSON") from error
    if grids.ndim != 3 or grids.dtype.kind not in "iu" or len(names) != len(grids):
        raise UserError(f"{str(path)!r} holds {grids.dtype} {list(grids.shape)} for {len(names)} pictures", "a grid is rows of whole numbers")
    return names, grids


def opened(model: str, system: str | None, layout: str | None, device: str | None) -> Any:
    import polysense

    return polysense.open(model, system=system, layout=layout, device=device)
