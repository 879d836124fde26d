"""generate: pictures out of words, or out of nothing."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json


def generate(text: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="What to draw; several texts are drawn one after the "
                                                              "other. Systems that draw without words take none.", show_default=False)] = None,
             model: Annotated[str, typer.Option("-m", "--model", metavar="RUN", help="A run folder, or with --system and --layout a published "
                                                "checkpoint.")] = "",
             count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="How many pictures of each text.")] = 4,
             steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of the sampler, where the system has one.")] = 20,
             guidance: Annotated[float | None, typer.Option(metavar="X", help="How much the words count: 1 as learned, 4 to 8 usual, more is "
                                                            "stricter.  [default: the system's]")] = None,
             seed: Annotated[int, typer.Option(metavar="N", min=0, help="Another seed draws other pictures.")] = 0,
             hint: Annotated[list[str] | None, typer.Option(metavar="FILE", help="A map to follow (edges, depth, segments); one, or one for each "
                                                            "text. A system that follows several kinds of map takes one of each kind.")] = None,
             extract: Annotated[str, typer.Option(metavar="MAP", help="The --hint files are photographs: take this map from them, canny "
                                                  "(outlines), lines (straight ones) or scribble (strokes of a pen).")] = "",
             strength: Annotated[list[float] | None, typer.Option(metavar="X", help="How much the --hint counts: 1 as learned, 0 not at all, less "
                                                                  "leaves more to the words. Where a system follows several kinds of map, give it "
                                                                  "once, or once for each kind.")] = None,
             guess: Annotated[bool, typer.Option("--guess", help="Let the --hint say what to draw: no text is needed, and coarse features of the map "
                                                 "count more than fine ones. A --guidance of 3 to 5 suits.")] = False,
             weighting: Annotated[bool, typer.Option("--weighting", help="Weigh the --hint by resolution, the coarser the more, on the side of the "
                                                     "guidance that has words: for a map that says too much under a strong --guidance.")] = False,
             sampler: Annotated[str | None, typer.Option(metavar="NAME", help="ddpm, ddim, dpm or plms, in place of the preset's.")] = None,
             out: Annotated[Path, typer.Option(metavar="FILE.png", help="The sheet of all pictures to write.")] = Path("generated.png"),
             each: Annotated[Path | None, typer.Option(metavar="DIR", help="Write every picture by itself, too.")] = None,
             system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Draw pictures with a trained system.

    \b
    Examples
      polysense generate "a red circle" -m runs/latent_diffusion -n 9 --guidance 4 --out circles.png
      polysense generate "a red circle" "a blue star" -m runs/latent_diffusion --each drawn/
      polysense generate "a red circle" -m runs/controlnet --hint photo.jpg --extract canny --strength 0.5
      polysense generate -m runs/controlnet --hint outline.png --guess --guidance 4
      polysense generate -m runs/ddpm -n 16 --steps 100 --seed 1
    """
    import polysense
    from polysense.app.files import place
    from polysense.cli.out import Bar, json_out, say
    from polysense.pipeline.draw import generate as draw
    from polysense.pipeline.draw import grid

    if not model:
        raise UserError("generate needs a model", "say which with -m, for instance -m runs/ddpm")
    if out.suffix.lower() != ".png":
        raise UserError(f"cannot write {out.name!r}", "the sheet is a PNG: give a name that ends in .png")
    for path in hint or []:
        if not Path(path).is_file():
            raise UserError(f"no file {path!r}", "check the path")
    if each is not None and each.exists() and not each.is_dir():
        raise UserError(f"{each} is a file", "give a folder")
    texts = list(text or [])
    pipeline = polysense.open(model, system=system, layout=layout, device=device)
    with Bar("drawing", "pictures") as bar:
        drawn = draw(pipeline, texts, count, steps=steps, guidance=guidance, seed=seed, hints=list(hint or []), extract=extract,
                     strength=strength or [], guess=guess, weighting=weighting, sampler=sampler, progress=bar)
    with place(out) as beside:
        grid(drawn, count if len(texts) > 1 else 0).save(beside, "PNG")
    files: list[str] = []
    if each is not None:
        each.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(drawn):
            file = each / f"{i:04d}.png"
            with place(file) as beside:
                picture.save(beside, "PNG")
            files.append(str(file))
    if as_json:
        json_out({"out": str(out), "pictures": len(drawn), "texts": texts, "seed": seed, "steps": steps, "each": files})
    else:
        say(f"{len(drawn)} pictures in {out}" + (f" and in {each}" if each else ""))
