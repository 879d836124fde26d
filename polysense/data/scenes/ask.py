"""Questions about a scene and their answers, computed from its description."""
from collections.abc import Callable, Sequence

import numpy as np

from polysense.data.scenes.palette import LIGHT_BACKDROPS, NUMBERS, SIZES, TEXTURES
from polysense.data.scenes.say import a, noun, plural, refer
from polysense.data.scenes.world import Scene, World, hides, relation

QA = tuple[str, str]
_ORDER = list(SIZES)


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _colour(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    return [(f"what colour is the {t.shape}?", t.colour) for t in scene.things if sum(o.shape == t.shape for o in scene.things) == 1]


def _shape(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    return [(f"what shape is the {t.colour} thing?", t.shape) for t in scene.things if sum(o.colour == t.colour for o in scene.things) == 1]


def _count(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    """Whole, per shape and per colour, one of them for something that may be absent."""
    t, things = scene.things[rng.integers(len(scene.things))], scene.things
    shape, colour = (_pick(rng, world.shapes), _pick(rng, world.colours)) if rng.random() < 0.25 else (t.shape, t.colour)
    return [("how many things are there?", NUMBERS[len(things)]),
            (f"how many {plural(shape)} are there?", NUMBERS[sum(o.shape == shape for o in things)]),
            (f"how many {colour} things are there?", NUMBERS[sum(o.colour == colour for o in things)]),
            (f"how many {t.colour} {plural(t.shape)} are there?", NUMBERS[sum((o.colour, o.shape) == (t.colour, t.shape) for o in things)])]


def _exists(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    """One yes and one no; the no changes the colour or the shape of something that is there.

    What is denied could appear in this world: were held-out pairs only ever denied, training would teach that they do not exist.
    """
    t, there = scene.things[rng.integers(len(scene.things))], {(o.colour, o.shape) for o in scene.things}
    pairs = world.pairs() if t.writing < 0 else tuple((c, t.shape) for c in world.colours)
    wrong = [f"{c} {s}" for c, s in pairs if (c, s) not in there and (c == t.colour) != (s == t.shape)]
    return [(f"is there {a(noun(t))}?", "yes")] + ([(f"is there {a(_pick(rng, wrong))}?", "no")] if wrong else [])


def _place(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    out: list[QA] = []
    for i, one in enumerate(scene.things):
        for j, two in enumerate(scene.things):
            x, y = refer(one, scene), refer(two, scene)
            if i == j or not x or not y:
                continue
            if where := relation(one, two):
                asked = where if rng.random() < 0.5 else {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[where]
                out.append((f"is {x} {asked} {y}?", _yes(asked == where)))
                there = [o for k, o in enumerate(scene.things) if k != j and relation(o, two) == where]
                unsure = [o for k, o in enumerate(scene.things) if k != j and relation(o, two) == ""]
                if len(there) == 1 and not unsure:
                    out.append((f"what is {where} {y}?", f"{a(noun(one))}"))
                    out.append((f"what colour is the thing {where} {y}?", one.colour))
            if hides(scene.things[max(i, j)], scene.things[min(i, j)]) > 0.03:
                out.append((f"is {x} in front of {y}?", _yes(i > j)))
    return out


def _size(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    out = [(f"what size is {words}?", t.size) for t in scene.things if (words := refer(t, scene)) and t.size not in words.split()]
    for i, one in enumerate(scene.things):
        for two in scene.things[i + 1:]:
            x, y = refer(one, scene), refer(two, scene)
            if x and y and one.size != two.size and not {one.size, two.size} & set(f"{x} {y}".split()):
                x, y = (x, y) if rng.random() < 0.5 else (y, x)
                big = refer(one if _ORDER.index(one.size) > _ORDER.index(two.size) else two, scene)
                out += [(f"which is larger, {x} or {y}?", big), (f"is {x} larger than {y}?", _yes(big == x))]
    return out


def _texture(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    words = [w for w in TEXTURES.values() if w]
    out: list[QA] = []
    for t in scene.things:
        x = refer(t, scene)
        if x and not set(words) & set(x.split()):
            asked = TEXTURES[t.texture] if t.texture != "plain" and rng.random() < 0.6 else _pick(rng, words)
            out.append((f"is {x} {asked}?", _yes(TEXTURES[t.texture] == asked)))
    return out


def _same(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    """Two steps: find a thing, then count or compare by what it is like."""
    t = scene.things[rng.integers(len(scene.things))]
    x = refer(t, scene)
    if not x or len(scene.things) < 2:
        return []
    return [(f"how many other things have the colour of {x}?", NUMBERS[sum(o.colour == t.colour for o in scene.things) - 1]),
            (f"how many other things have the shape of {x}?", NUMBERS[sum(o.shape == t.shape for o in scene.things) - 1])]


def _background(scene: Scene, world: World, rng: np.random.Generator) -> list[QA]:
    asked = "light" if rng.random() < 0.5 else "dark"
    return [("what colour is the background?", scene.backdrop.colour),
            (f"is the background {asked}?", _yes((scene.backdrop.colour in LIGHT_BACKDROPS) == (asked == "light")))]


ASKERS: dict[str, Callable[[Scene, World, np.random.Generator], list[QA]]] = {
    "colour": _colour, "shape": _shape, "count": _count, "exists": _exists, "relation": _place, "size": _size, "texture": _texture,
    "same": _same, "background": _background}


def questions(scene: Scene, world: World, rng: np.random.Generator, each: int = 2) -> list[QA]:
    """Up to `each` questions of every kind that a scene of this world allows, shuffled. Answers are words of the captions, a number, yes or no."""
    out: list[QA] = []
    for asker in ASKERS.values():
        said = asker(scene, world, rng)
        out += [said[i] for i in rng.permutation(len(said))[:each]]
    return [out[i] for i in rng.permutation(len(out))]
