"""fill, translate: texts without pictures."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json
from polysense.cli.use import Model, _open


def fill(text: Annotated[str, typer.Argument(metavar="TEXT", help="A text with ___ wherever a word is missing.")], model: Model,
         top: Annotated[int, typer.Option("-k", "--count", metavar="N", min=1, help="How many words for each gap.")] = 5,
         system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Guess the missing words of a text, by a system that reads in both directions.

    \b
    Examples
      polysense fill "a dog ___ on the grass" -m runs/bert
      polysense fill "a ___ rides a ___" -m downloads/bert-base-uncased --system bert --layout hf --json
    """
    from polysense.cli.out import json_out, table

    gaps = _open(model, system, layout, device).fill(text, top=top)
    if as_json:
        json_out({"text": text, "gaps": [[{"word": g.word, "probability": g.probability} for g in gap] for gap in gaps]})
        return
    table(("gap", "word", "probability"), [(str(n), g.word, f"{g.probability:.3f}") for n, gap in enumerate(gaps, 1) for g in gap],
          right=("gap", "probability"))


def translate(model: Model,
              texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="What to translate.", show_default=False)] = None,
              file: Annotated[Path | None, typer.Option(metavar="FILE", help="Translate each line of a UTF-8 file instead.")] = None,
              out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the translations here, one a line.")] = None,
              max_new: Annotated[int, typer.Option("--max-new", metavar="N", min=1, help="The most tokens to write.")] = 128,
              how: Annotated[str, typer.Option(metavar="HOW", help="How words are chosen: greedy, beam:5 or sample:0.9.  [default: the "
                                               "system's own way]", show_default=False)] = "",
              seed: Annotated[int, typer.Option(metavar="N", help="Decides what is drawn with --how sample.")] = 0,
              system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Turn texts into other texts, by a system that was trained on pairs of them.

    \b
    Examples
      polysense translate "in English: put circle red plain large left ; on plain white" -m runs/transformer
      polysense translate --file lines.txt --out translated.txt -m runs/transformer --how beam:4
    """
    from polysense.app.files import place
    from polysense.cli.out import json_out, say

    if bool(texts) == bool(file):
        raise UserError("give texts, or a file of them", 'such as polysense translate "a text" -m RUN, or --file lines.txt')
    given = list(texts or ())
    if file is not None:
        try:
            given = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read texts from {str(file)!r}", "give a UTF-8 file with one text a line") from error
    said = _open(model, system, layout, device).translate(given, max_new=max_new, how=how, seed=seed)
    if out is not None:
        with place(out) as beside:
            beside.write_text("".join(f"{' '.join(line.split())}\n" for line in said), encoding="utf-8")
    if as_json:
        json_out({"translations": [{"text": t, "translation": s} for t, s in zip(given, said, strict=True)], "out": out and str(out)})
        return
    for line in [f"{len(said)} texts in {out}"] if out is not None else said:
        say(line)
