"""English for scenes: phrases that name things and captions in many phrasings. Everything said is true of the scene."""
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from polysense.data.scenes.palette import BACKDROP_KINDS, NUMBERS, TEXTURES
from polysense.data.scenes.world import Backdrop, Scene, Thing, hides, relation

_PLURALS = {"cross": "crosses"}


def plural(shape: str) -> str:
    """`circle` -> `circles`, `cross` -> `crosses`, `digit six` -> `digits six`."""
    first, _, rest = shape.partition(" ")
    return _PLURALS.get(first, first + "s") + (f" {rest}" if rest else "")


def a(noun: str) -> str:
    """With the indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def noun(t: Thing, *, size: bool = False, texture: bool = False) -> str:
    """`red circle`, and with more detail `small striped red circle`; a plain texture is never said."""
    return " ".join(w for w in (t.size if size else "", TEXTURES[t.texture] if texture else "", t.colour, t.shape) if w)


def ground(b: Backdrop) -> str:
    """`plain white background`."""
    return f"{BACKDROP_KINDS[b.kind]} {b.colour} background"


def spot(t: Thing) -> str:
    """Where in the picture: `top left`, `centre`, `bottom`, ...; "" near the borders between two ninths."""
    words = []
    for at, low, high in ((t.y, "top", "bottom"), (t.x, "left", "right")):
        if 0.37 < at < 0.41 or 0.59 < at < 0.63:
            return ""
        words.append(low if at < 0.4 else high if at > 0.6 else "")
    return " ".join(w for w in words if w) or "centre"


def in_spot(t: Thing) -> str:
    """`in the top left`, `on the right`, `at the bottom`, or ""."""
    where = spot(t)
    return f"{'on' if where in ('left', 'right') else 'at' if where in ('top', 'bottom') else 'in'} the {where}" if where else ""


def refer(t: Thing, scene: Scene) -> str:
    """The shortest definite phrase that fits this thing alone (`the circle`, `the large red circle`), or "" where none does."""
    ways: tuple[Callable[[Thing], str], ...] = (
        lambda o: o.shape, lambda o: noun(o), lambda o: f"{o.size} {o.shape}", lambda o: noun(o, size=True),
        lambda o: noun(o, texture=True) if o.texture != "plain" else "", lambda o: noun(o, size=True, texture=True) if o.texture != "plain" else "")
    for way in ways:
        # A phrase without a texture word fits textured things too, so compare on the phrase, not on equality of all traits.
        if (words := way(t)) and sum(way(o) == words for o in scene.things) == 1:
            return f"the {words}"
    return ""


def enumerate_words(words: list[str]) -> str:
    """`x`, `x and y`, `x, y and z`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(names: Iterable[tuple[str, str]]) -> str:
    """(colour or "", shape) pairs -> `three red circles and a blue star`."""
    return enumerate_words([a(f"{c} {s}".strip()) if n == 1 else " ".join(w for w in (NUMBERS[n], c, plural(s)) if w)
                            for (c, s), n in Counter(names).items()])


def _one(scene: Scene, rng: np.random.Generator) -> list[str]:
    t = scene.things[0]
    name, full = noun(t), noun(t, size=True, texture=True)
    out = [a(name), f"a picture of {a(full)}", f"there is {a(noun(t, size=True))} on {a(ground(scene.backdrop))}",
           f"{a(noun(t, texture=True))} on {a(f'{scene.backdrop.colour} background')}", a(full),
           f"one {t.shape}, {t.size} and {t.colour}", f"this {t.shape} is {t.colour}"]
    if where := in_spot(t):
        out.append(f"{a(name)} {where}")
    return out


def _related(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Sentences about pairs: places, and who stands in front of whom."""
    out: list[str] = []
    for i in rng.permutation(len(scene.things)):
        for j in rng.permutation(len(scene.things)):
            one, two = scene.things[i], scene.things[j]
            if i == j or (one.colour, one.shape) == (two.colour, two.shape):
                continue
            if i > j and hides(one, two) > 0.03:
                out.append(f"{a(noun(one))} in front of {a(noun(two, texture=True))}")
            elif where := relation(one, two):
                out.append(f"{a(noun(one, size=True))} {where} {a(noun(two, texture=True))}")
    return out


def _many(scene: Scene, rng: np.random.Generator) -> list[str]:
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    kinds, shapes = counted((t.colour, t.shape) for t in things), counted(("", t.shape) for t in things)
    n = NUMBERS[len(things)]
    out = [kinds, f"a picture of {kinds}", f"{kinds} on {a(ground(scene.backdrop))}", f"there are {n} things: {kinds}",
           f"{n} things on {a(f'{scene.backdrop.colour} background')}: {shapes}", f"a scene with {shapes}"]
    if len({(t.colour, t.shape) for t in things}) == len(things):
        out.append(enumerate_words([a(noun(t, size=True, texture=True)) for t in things]))
    pairs = _related(scene, rng)
    out += pairs[:3]
    if pairs:
        out.append(f"{pairs[0]} on {a(f'{scene.backdrop.colour} background')}")
    return out


def captions(scene: Scene, rng: np.random.Generator, limit: int = 5) -> list[str]:
    """Up to `limit` different true captions, in an order drawn by `rng`."""
    said = list(dict.fromkeys((_one if len(scene.things) == 1 else _many)(scene, rng)))
    return [said[i] for i in rng.permutation(len(said))[:limit]]
