"""caption, ask, chat: words about pictures."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device, Layout, System
from polysense.cli.systems import Json
from polysense.cli.use import Model, _open

How = Annotated[str, typer.Option(metavar="HOW", help="How words are chosen: greedy, beam:5 or sample:0.9.")]
Most = Annotated[int, typer.Option("--max-new", metavar="N", min=1, help="The most tokens to write.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Decides what is drawn with --how sample.")]
Photo = Annotated[str, typer.Argument(metavar="PHOTO", help="A picture: a file or an http address.")]


def caption(photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="A folder of pictures, searched at any depth, or one picture.")],
            model: Model,
            out: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write the captions into a table: path, caption.")] = None,
            example: Annotated[list[str] | None, typer.Option("--example", metavar="PHOTO=TEXT", help="Show what is wanted, for systems that learn "
                                                              "from a few examples (flamingo); may be given several times.")] = None,
            max_new: Most = 64, how: How = "greedy", seed: Seed = 0,
            system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Describe pictures in words.

    \b
    Examples
      polysense caption holiday.jpg -m runs/blip2
      polysense caption ~/photos -m runs/llava --out captions.csv
      polysense caption ~/photos -m runs/llava --how beam:5 --json
      polysense caption new.jpg -m runs/flamingo --example cat.jpg="a cat: meow" --example dog.jpg="a dog: woof"
    """
    from polysense.app.files import find_photos
    from polysense.cli.out import Bar, json_out, note, say, table
    from polysense.data.images import decode

    if not photos.exists():
        raise UserError(f"no folder or file {str(photos)!r}", "check the path")
    paths = sorted(p for p, _, _ in find_photos(photos)) if photos.is_dir() else [str(photos)]
    if not paths:
        raise UserError(f"no pictures in {str(photos)!r}", "check the path")
    examples = [(photo, text) for photo, eq, text in (e.partition("=") for e in example or ()) if eq and text.strip()]
    if len(examples) != len(example or ()):
        raise UserError("an example is a picture and a text", 'it looks like --example cat.jpg="a cat"')
    pipeline = _open(model, system, layout, device)
    pipeline._need("generate_text")
    said: list[tuple[str, str]] = []
    skipped: list[tuple[str, str]] = []
    with Bar("captioning", "pictures") as bar:
        for start in range(0, len(paths), 16):
            good = []
            for path in paths[start:start + 16]:
                try:
                    good.append((path, decode(path)))
                except UserError as error:
                    skipped.append((path, error.advice or error.what))
            if good:
                captions = pipeline.caption([picture for _, picture in good], examples=examples, max_new=max_new, how=how, seed=seed)
                said += [(path, text) for (path, _), text in zip(good, captions, strict=True)]
            bar(min(start + 16, len(paths)), len(paths))
    if not said:
        raise UserError(f"none of the {len(paths)} pictures can be read", f"the first: {skipped[0][1]}")
    if out is not None:
        _write(out, said)
    if as_json:
        json_out({"captions": [{"path": p, "caption": c} for p, c in said], "skipped": [{"path": p, "reason": r} for p, r in skipped]})
        return
    if out is not None:
        say(f"{len(said)} captions in {out}")
    else:
        table(("picture", "caption"), said)
    for path, reason in skipped[:5]:
        note(f"left out {path}: {reason}")


def ask(photo: Photo, question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")], model: Model,
        max_new: Most = 64, how: How = "greedy", seed: Seed = 0,
        system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Ask a question about a picture.

    \b
    Examples
      polysense ask holiday.jpg "how many people are there?" -m runs/llava
      polysense ask holiday.jpg "what colour is the car?" -m runs/llava --json
    """
    from polysense.cli.out import json_out, say

    _there(photo)
    answer = _open(model, system, layout, device).ask(photo, question, max_new=max_new, how=how, seed=seed)
    json_out({"image": photo, "question": question, "answer": answer}) if as_json else say(answer)


def chat(photo: Photo, model: Model,
         message: Annotated[list[str] | None, typer.Option("--message", metavar="TEXT", help="Say this and print the reply, without a conversation; "
                                                           "several are said one after the other.")] = None,
         max_new: Most = 256, how: How = "greedy", seed: Seed = 0,
         system: System = None, layout: Layout = None, device: Device = None, as_json: Json = False) -> None:
    """Talk about a picture. Type what you want to say; an empty line ends the conversation.

    \b
    Examples
      polysense chat holiday.jpg -m runs/llava
      polysense chat holiday.jpg -m runs/llava --message "what is this?" --message "and what colour is it?"
    """
    from polysense.cli.out import json_out, note, say

    _there(photo)
    pipeline = _open(model, system, layout, device)
    pipeline._need("generate_text")
    said: list[str] = []

    def reply(text: str) -> str:
        said.append(text)
        said.append(pipeline.chat(photo, said, max_new=max_new, how=how, seed=seed))
        return said[-1]

    if message:
        for text in message:
            answer = reply(text)
            if not as_json:
                say(answer)
    else:
        note("an empty line ends the conversation")
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                break
            if not text:
                break
            say(reply(text))
    if as_json:
        json_out({"image": photo, "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]})


def _there(photo: str) -> None:
    if "://" not in photo and not Path(photo).is_file():
        raise UserError(f"no file {photo!r}", "check the path")


def _write(out: Path, said: list[tuple[str, str]]) -> None:
    import csv

    from polysense.app.files import place

    with place(out) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(("path", "caption"))
        rows.writerows(said)
