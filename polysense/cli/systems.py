"""list, show, new, convert: the catalogue and its files."""
from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from polysense.base.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="A system's id, as `polysense list` shows it.")]


def list_(can: Annotated[str | None, typer.Option(metavar="CAPABILITY", help="Only systems with this capability, such as encode_text.")] = None,
          family: Annotated[str | None, typer.Option(metavar="FAMILY", help="Only one family, such as align.")] = None,
          as_json: Json = False) -> None:
    """List the systems: what each can do, and which presets it has.

    \b
    Examples
      polysense list
      polysense list --can encode_text
      polysense list --family backbone --json
    """
    from polysense.base.catalogue import catalogue
    from polysense.cli.out import json_out, table

    cards = list(catalogue().values())
    if can is not None:
        from polysense.base.protocols import CAPABILITIES

        _known(can, list(CAPABILITIES), "capability", "the capabilities are")
        cards = [c for c in cards if can in c.can]
    if family is not None:
        _known(family, sorted({c.family for c in cards}), "family", "the families are")
        cards = [c for c in cards if c.family == family]
    if as_json:
        json_out([_card(c) for c in cards])
    else:
        table(("id", "family", "year", "presets", "can", "what it does"),
              [(c.id, c.family, c.year, _few(c.presets), " ".join(c.can), c.says) for c in cards])


def _card(card: Any) -> dict[str, Any]:
    said = asdict(card)
    return {k: said[k] for k in ("id", "name", "family", "can", "needs", "presets")} | said


def _few(presets: tuple[str, ...], most: int = 3) -> str:
    return " ".join(presets[:most]) + (f" +{len(presets) - most}" if len(presets) > most else "")


def _known(word: str, names: list[str], what: str, advice: str) -> None:
    if word not in names:
        close = get_close_matches(word, names, 2)
        raise UserError(f"no {what} {word!r}", f"did you mean {' or '.join(close)}?" if close else f"{advice} {', '.join(names) or 'none'}")


def show(id: Id, preset: Annotated[str, typer.Option(metavar="PRESET", help="Whose configuration and parameters to show.")] = "tiny",
         as_json: Json = False) -> None:
    """Show one system: its card, presets, full configuration, and parameter counts (no weights are made).

    \b
    Examples
      polysense show clip
      polysense show clip --preset paper
      polysense show vit --json
    """
    from polysense.base.catalogue import card_of, load, preset_of
    from polysense.cli.out import json_out, say, short, table

    card = card_of(id)
    value = preset_of(id, preset)
    module, lines = load(id), list(value.lines())
    total, parts = count_parameters(value.config)
    if as_json:
        json_out({**_card(card), "preset": {"name": preset, "data": value.data, "digest": value.digest(), "lines": lines,
                                             "parameters": {"total": total, "by_module": parts},
                                             "stages": [{"name": s.name, "steps": s.steps, "batch_size": s.batch_size,
                                                         "trainable": list(s.trainable)} for s in value.stages]},
                  "layouts": list(getattr(module, "weights", {})), "about": (module.__doc__ or "").strip()})
        return
    say(f"{card.name} ({card.id}, {card.family})")
    say(f"  {card.says}")
    say(f"  {card.paper}" + (f", arXiv {card.arxiv}" if card.arxiv else ""))
    say(f"  can      {', '.join(card.can) or 'nothing on its own'}")
    say(f"  needs    {', '.join(card.needs)}")
    if layouts := getattr(module, "weights", {}):
        say(f"  layouts  {', '.join(layouts)}   (polysense convert, polysense.open)")
    say(f"  source   {Path(str(module.__file__)).name}\n")
    say((module.__doc__ or "").strip() + "\n")
    table(("preset", "about"), [(p, _first_line(getattr(module, p))) for p in card.presets])
    say(f"\n{preset}: {total:,} parameters, data {value.data}")
    for s in value.stages:
        say(f"  stage {s.name}: {s.steps:,} steps of batch {s.batch_size}, {s.optim.name} at {s.optim.lr:g}")
    say()
    table(("module", "parameters", ""), [(k, f"{n:,}", short(n)) for k, n in parts.items()], right=("parameters",))
    say()
    for line in lines:
        say(line)


def _first_line(function: Any) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


def count_parameters(config: Any) -> tuple[int, dict[str, int]]:
    """(total, by top-level module) of what a config builds, on the meta device: nothing is allocated. A shared weight counts once."""
    import torch

    with torch.device("meta"):
        built = config.build()
    parts, seen = {}, set()
    for name, p in getattr(built, "named_parameters", lambda: ())():
        if id(p) not in seen:
            seen.add(id(p))
            head = name.split(".")[0]
            parts[head] = parts.get(head, 0) + p.numel()
    return sum(parts.values()), parts


def new(id: Annotated[str, typer.Argument(metavar="ID", help="The new system's id in snake_case: it becomes the file's name.")],
        family: Annotated[str, typer.Option(metavar="FAMILY", help="The folder below systems/ that the file goes into.")] = "align",
        into: Annotated[Path | None, typer.Option(metavar="DIR", help="Another systems/ folder than polysense's own.")] = None) -> None:
    """Write the skeleton of a recipe. It stands in the catalogue at once and fails its contract until it is filled.

    \b
    Examples
      polysense new blip2 --family fuse
      pytest tests/contract -k blip2        what is still missing
    """
    from polysense.cli.out import say
    from polysense.cli.skeleton import write_skeleton

    path = write_skeleton(id, family, into)
    say(f"{path}\nfill it in until its contract holds: pytest tests/contract -k {id}   (CONTRIBUTING.md walks through it)")


def convert(source: Annotated[Path, typer.Argument(metavar="SRC", help="A published checkpoint (folder or file), or a run folder.")],
            target: Annotated[Path, typer.Argument(metavar="DST", help="Where to write: a run folder, or a checkpoint in the layout.")],
            system: Annotated[str, typer.Option("--system", metavar="ID", help="Which system the weights belong to.")],
            layout: Annotated[str, typer.Option("--layout", metavar="LAYOUT", help="Whose layout: hf, openai, open_clip, timm ...")],
            check: Annotated[Path | None, typer.Option(metavar="REF", help="A .safetensors file of inputs (image, text) and of the outputs "
                                                       "(encode_image, encode_text) that the authors' code gave: compared first; where they "
                                                       "differ, the usual causes are tried and named.")] = None,
            settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What the published file does not say about its "
                                                               "configuration; may be given several times.")] = None,
            as_json: Json = False) -> None:
    """Translate weights between a published layout and ours; the direction follows from what SRC is.

    \b
    Examples
      polysense convert downloads/clip-vit-base-patch32 runs/b32 --system clip --layout hf
      polysense convert runs/clip exported --system clip --layout open_clip
      polysense convert ViT-B-32.pt runs/b32 --system clip --layout openai --check recorded.safetensors
      polysense convert laion-b32 runs/laion --system clip --layout hf --check recorded.safetensors --set vision.body.block.mlp.act=gelu
    """
    from polysense.cli.converting import convert_weights
    from polysense.cli.out import json_out, say

    told = convert_weights(source, target, system, layout, check, settings or ())
    if as_json:
        json_out(told)
        return
    checked = "" if told["largest_difference"] is None else f", outputs within {told['largest_difference']:.1g} of the reference"
    way = "in" if told["direction"] == "export" else "from"
    say(f"{told['to']}: {told['parameters']:,} parameters of {system} {way} the layout {layout}{checked}")
