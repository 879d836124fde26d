"""agent: systems that chain other systems, from the command line."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polysense.base.errors import UserError
from polysense.cli.learn import Device
from polysense.cli.systems import Json


def agent(id: Annotated[str, typer.Argument(metavar="ID", help="The agent, such as mm_react.")],
          photos: Annotated[list[Path] | None, typer.Argument(metavar="PHOTO...", help="Pictures that the questions are about; a video is read "
                                                              "as frames, a PDF as pages.", show_default=False)] = None,
          question: Annotated[list[str] | None, typer.Option("--ask", metavar="QUESTION", help="What to ask; several are asked one after the other, "
                                                             "and the conversation is remembered.")] = None,
          helper: Annotated[list[str] | None, typer.Option("--helper", metavar="ROLE=RUN", help="Who sits in a role: a run folder. May be given "
                                                           "several times.")] = None,
          llm: Annotated[str | None, typer.Option("--llm", metavar="URL", help="An OpenAI-compatible server that plans; else rules do.")] = None,
          model: Annotated[str, typer.Option("--llm-model", metavar="NAME", help="The language model's name there.")] = "gpt-3.5-turbo",
          frames: Annotated[int, typer.Option("--frames", metavar="N", min=1, help="Frames of each video.")] = 4,
          steps: Annotated[bool, typer.Option("--steps", help="Show every step, not only the answers.")] = False,
          device: Device = None, as_json: Json = False) -> None:
    """Ask questions about pictures of an agent, which asks experts: it reads, counts, adds, and tells left from right.

    \b
    Examples
      polysense agent mm_react lunch.png dinner.png --ask "What is the total of the two receipts?"
      polysense agent mm_react invoice.pdf --ask "What is the total?"
      polysense agent mm_react street.jpg --ask "What is written there?" --ask "How many signs?" --steps
      polysense agent mm_react street.jpg --ask "What do you see?" --helper captioner=runs/llava --helper tagger=runs/clip
      polysense agent mm_react street.jpg --ask "Is the shop open?" --llm http://localhost:8000/v1 --llm-model qwen
    """
    from polysense.base.agent import Agent
    from polysense.base.catalogue import catalogue, load, preset_of
    from polysense.cli.out import json_out, say

    config = preset_of(id).config
    if not issubclass(config.owner, Agent):
        able = [c.id for c in catalogue().values() if "ask" in c.can]
        raise UserError(f"{id} is no agent", f"agents are {', '.join(able)}")
    if not question:
        raise UserError("there is no question", 'say --ask "..."')
    if llm:
        config = config.but(planner=load("mm_react").Endpoint.Config(model=model, url=llm))
    made: Any = config.build()
    for word in helper or ():
        role, eq, run = word.partition("=")
        if not eq or not run:
            raise UserError(f"cannot read --helper {word!r}", "it looks like tagger=runs/clip")
        import polysense

        if role not in made.roles:
            raise UserError(f"{id} has no role {role!r}", f"its roles are {', '.join(made.roles)}")
        made.seat(role, polysense.open(run, device=device))
    import tempfile

    with tempfile.TemporaryDirectory(prefix="polysense-frames-") as folder:
        images = pictures(photos or [], Path(folder), frames)
        answers = [{"question": q, "answer": made.ask(q, images if i == 0 else ())} for i, q in enumerate(question)]
    if as_json:
        json_out({"agent": id, "images": images, "answers": answers, "log": [e.to_json() for e in made.log]})
        return
    if steps:
        for event in made.log:
            say(f"[{event.kind}{' ' + event.tool if event.tool else ''}] {event.text}")
        return
    for each in answers:
        say(each["answer"])


def pictures(photos: list[Path], folder: Path, frames: int) -> list[str]:
    """Paths of pictures; of a video the paths of `frames` of its frames, evenly spaced, written into `folder` and named by their time in it; of a PDF
    those of its pages."""
    from polysense.base.plan import VideoPlan
    from polysense.data.clips import MOVIE_ENDINGS, chosen, decoded, frame_rate, picked
    from polysense.data.documents import ENDING, pages

    out: list[str] = []
    for photo in photos:
        if not photo.is_file():
            raise UserError(f"no file {str(photo)!r}", "check the path")
        if photo.suffix.lower() == ENDING:
            out += pages(photo, folder)
            continue
        if photo.suffix.lower() not in MOVIE_ENDINGS:
            out.append(str(photo))
            continue
        from PIL import Image

        plan, rate = VideoPlan(frames=frames), frame_rate(str(photo)) or 1.0
        at = picked(sum(1 for _ in decoded(str(photo))), plan)
        for k, (i, frame) in enumerate(zip(at, chosen(str(photo), plan), strict=True)):
            place = folder / f"{photo.stem}-{k + 1}-at-{i / rate:.2f}s.png"
            Image.fromarray(frame).save(place)
            out.append(str(place))
    return out
