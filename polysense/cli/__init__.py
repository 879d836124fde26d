"""The command line. Every import beyond typer and the catalogue stands inside a command, so help and lists answer at once.

`main(words=None) -> int` runs one command and returns its exit status: 0, 1 (an error of ours), 2 (an error of the user's), 130 (interrupted).
"""
from __future__ import annotations

import sys
from typing import Annotated

import typer

from polysense.base.errors import UserError
from polysense.cli import agents, attend, clips, codes, compare, data, draw, learn, mask, match, merge, scene, systems, talk, texts, use
from polysense.cli.out import Stopped

__all__ = ["app", "main"]

LEARN, USE, LOOK, BUILD = "Train and examine", "Use", "Look around", "Build"
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}

app = typer.Typer(name="polysense", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, context_settings=SETTINGS)


def _version(asked: bool) -> None:
    if asked:
        from polysense import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _top(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works behind any command.")] = False,
         version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False) -> None:
    """Train multimodal systems on your own pictures, then search, label and examine with them.

    [bold]First steps[/bold]

    \b
      polysense list                                      what there is
      polysense train clip --data scenes --out runs/clip  train it
      polysense index PHOTOS -m runs/clip                 make searchable
      polysense search "a red circle" --index PHOTOS      ask

    Every command explains itself, with examples: polysense COMMAND --help
    """


for name, command, panel in (
        ("list", systems.list_, LOOK), ("show", systems.show, LOOK),
        ("train", learn.train, LEARN), ("exam", learn.exam, LEARN), ("prove", learn.prove, LEARN),
        ("compare", compare.compare, LEARN),
        ("report", learn.report, LEARN),
        ("index", use.index, USE), ("search", use.search, USE), ("label", use.label, USE), ("encode", use.encode, USE),
        ("caption", talk.caption, USE), ("ask", talk.ask, USE), ("chat", talk.chat, USE),
        ("fill", texts.fill, USE), ("translate", texts.translate, USE),
        ("match", match.match, USE), ("reconstruct", codes.reconstruct, USE), ("attend", attend.attend, USE), ("codes", codes.codes, USE),
        ("decode", codes.decode, USE), ("generate", draw.generate, USE),
        ("segment", mask.segment, USE), ("detect", mask.detect, USE), ("render", scene.render, USE),
        ("agent", agents.agent, USE), ("clips", clips.clips, USE),
        ("convert", systems.convert, BUILD), ("merge", merge.merge, BUILD), ("new", systems.new, BUILD)):
    app.command(name, rich_help_panel=panel)(command)
app.add_typer(data.app, name="data", rich_help_panel=LOOK)


def main(words: list[str] | None = None) -> int:
    """Run one command. Every error becomes one line on stderr; `--debug` (anywhere before a lone `--`) raises it instead."""
    words = list(sys.argv[1:] if words is None else words)
    options = words[:words.index("--")] if "--" in words else words
    debug = "--debug" in options
    words = [w for w in options if w != "--debug"] + words[len(options):]
    try:
        status = app(words, prog_name="polysense", standalone_mode=False)
        sys.stdout.flush()
        return _say("stopped", 130) if status == 130 else status if isinstance(status, int) else 0
    except Stopped as stopped:
        return _say(str(stopped), 130)
    except (KeyboardInterrupt, typer.Abort):
        return _say("stopped", 130)
    except (BrokenPipeError, SystemExit) as error:   # typer leaves by SystemExit where the reader of a pipe has had enough: `polysense list | head`
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        import os

        if sys.__stdout__:                           # what is still buffered goes nowhere, quietly
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        sys.stdout = sys.__stdout__
        return 0
    except UserError as error:
        if debug:
            raise
        return _say(f"error: {error}", 2)
    except Exception as error:
        if (usage := getattr(error, "format_message", None)) is not None:      # typer's own: unknown command, missing argument
            return _usage(error, usage())
        if debug:
            raise
        return _say(f"error: {type(error).__name__}: {error} (this should not happen; --debug shows where)", 1)


def _usage(error: Exception, message: str) -> int:
    context = getattr(error, "ctx", None)
    if not message or type(error).__name__ == "NoArgsIsHelpError":
        return 0 if message is not None and context is None else 2
    path = context.command_path if context else "polysense"
    return _say(f"error: {message.rstrip('.')} (see {path} --help)", 2)


def _say(text: str, status: int) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return status
