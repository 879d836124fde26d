"""Finds every recipe by reading its literal `card = Card(...)`; imports nothing, so listing costs milliseconds."""
import ast
import re
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from polysense.base.card import Card
from polysense.base.errors import UserError

ROOT = Path(__file__).parent.parent / "systems"
PRESET = re.compile(r"^def ([a-z]\w*)\(\) -> Preset:", re.M)


def read_card(path: Path) -> Card | None:
    """Parses only the text between `card = Card(` and the `)` in column 0; None where there is no card."""
    text = path.read_text(encoding="utf-8")
    _, _, rest = text.partition("\ncard = Card(\n")
    inside, closed, _ = rest.partition("\n)\n")
    if not closed:
        return None
    call = ast.parse(f"Card(\n{inside}\n)", mode="eval").body
    assert isinstance(call, ast.Call)
    said = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    return Card(**said, presets=tuple(PRESET.findall(text)))


@cache
def catalogue(root: Path = ROOT) -> dict[str, Card]:
    """All systems by id, sorted; no recipe is imported."""
    found: dict[str, Card] = {}
    for path in sorted(root.rglob("[a-z]*.py"), key=lambda p: p.stem):
        if card := read_card(path):
            if path.stem in found:
                raise ValueError(f"two systems are called {path.stem!r}")
            dotted = ".".join(path.relative_to(root.parent.parent).with_suffix("").parts)
            found[path.stem] = replace(card, id=path.stem, family=path.parent.name, module=dotted)
    return found


def card_of(name: str) -> Card:
    """The card of one system; an unknown name is refused with its nearest neighbours."""
    cards = catalogue()
    if name not in cards:
        close = get_close_matches(name, cards, 3)
        raise UserError(f"no system {name!r}", f"did you mean {' or '.join(close)}?" if close else "see `polysense list`")
    return cards[name]


def load(name: str) -> ModuleType:
    """The recipe module of a system (this is where torch gets imported)."""
    return import_module(card_of(name).module)


def preset_of(name: str, preset: str = "tiny"):
    """`Preset` value of a system, by name; an unknown preset is refused with the list of those that exist."""
    card = card_of(name)
    if preset not in card.presets:
        raise UserError(f"{name} has no preset {preset!r}", f"it has {', '.join(card.presets)}")
    return getattr(load(name), preset)()
