"""Instructions that change one thing about a scene, and the scene after them. All else stays: light, textures, every other thing."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from polysense.data.scenes.palette import clear_on
from polysense.data.scenes.say import a, ground, in_spot, noun, refer
from polysense.data.scenes.world import Scene, Thing, World, hides


@dataclass(frozen=True)
class Edit:
    kind: str                                # of KINDS
    instructions: list[str]                  # phrasings of one wish, in an order drawn by lot
    scene: Scene                             # after it


Change = tuple[list[str], Scene] | None


def _choose(rng: np.random.Generator, items: list[str]) -> str:
    return items[rng.integers(len(items))]


def _target(scene: Scene, rng: np.random.Generator, shapes_only: bool = False) -> tuple[int, str] | None:
    """A thing that words can single out, and the words."""
    named = [(i, words) for i, t in enumerate(scene.things) if (words := refer(t, scene)) and not (shapes_only and t.writing >= 0)]
    return named[rng.integers(len(named))] if named else None


def _recolour(scene: Scene, world: World, rng: np.random.Generator) -> Change:
    if (found := _target(scene, rng)) is None:
        return None
    i, words = found
    t = scene.things[i]
    touching = {o.colour for o in scene.things if o is t or hides(o, t) > 0}       # two things of one colour would melt together
    free = [c for c in clear_on(scene.backdrop.colour) if c not in touching and c in world.colours and
            (t.writing >= 0 or (c, t.shape) in world.pairs())]
    if not free:
        return None
    colour = _choose(rng, free)
    return [f"make {words} {colour}", f"change the colour of {words} to {colour}", f"paint {words} {colour}"], scene.but(i, colour=colour)


def _reshape(scene: Scene, world: World, rng: np.random.Generator) -> Change:
    if (found := _target(scene, rng, shapes_only=True)) is None:
        return None
    i, words = found
    t = scene.things[i]
    free = [s for c, s in world.pairs() if c == t.colour and s != t.shape]
    if not free:
        return None
    shape = _choose(rng, free)
    return [f"turn {words} into {a(shape)}", f"replace {words} with {a(f'{t.colour} {shape}')}"], scene.but(i, shape=shape)


def _remove(scene: Scene, world: World, rng: np.random.Generator) -> Change:
    if len(scene.things) < 2 or (found := _target(scene, rng)) is None:
        return None
    i, words = found
    return [f"remove {words}", f"take {words} away", f"delete {words}"], replace(scene, things=scene.things[:i] + scene.things[i + 1:])


def _add(scene: Scene, world: World, rng: np.random.Generator) -> Change:
    for _ in range(8):
        kind = world.kind(rng)
        t = world.place(rng, kind, list(scene.things), 0.04, crowd=len(scene.things) + 1) if kind[0] in clear_on(scene.backdrop.colour) else None
        if t is not None and in_spot(t):
            what = f"{a(noun(t, size=True, texture=True))} {in_spot(t)}"
            return [f"{verb} {what}" for verb in ("add", "put", "draw")], replace(scene, things=(*scene.things, t))
    return None


_WAYS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}


def _clear(t: Thing, others: list[Thing]) -> bool:
    edge = 1.16 * t.r
    return edge <= min(t.x, t.y) and max(t.x, t.y) <= 1 - edge and all(np.hypot(t.x - o.x, t.y - o.y) > 1.1 * (t.r + o.r) for o in others)


def _move(scene: Scene, world: World, rng: np.random.Generator) -> Change:
    if (found := _target(scene, rng)) is None:
        return None
    i, words = found
    t, others = scene.things[i], [o for k, o in enumerate(scene.things) if k != i]
    for turn in rng.permutation(len(_WAYS)):
        way = list(_WAYS)[turn]
        for far in (0.4, 0.3, 0.22):
            new = replace(t, x=t.x + far * _WAYS[way][0], y=t.y + far * _WAYS[way][1])
            if _clear(new, others):
                return [f"move {words} {way}", f"shift {words} {way}"], scene.but(i, x=new.x, y=new.y)
    return None


def _background(scene: Scene, world: World, rng: np.random.Generator) -> Change:
    new = world.backdrop(rng, {t.colour for t in scene.things}, avoid=scene.backdrop.colour)
    said = [f"change the background to {a(ground(new))}", f"put everything on {a(ground(new))}"]
    if new.kind == scene.backdrop.kind:
        said.append(f"make the background {new.colour}")
    return said, replace(scene, backdrop=new)


KINDS: dict[str, Callable[[Scene, World, np.random.Generator], Change]] = {
    "recolour": _recolour, "reshape": _reshape, "remove": _remove, "add": _add, "move": _move, "background": _background}


def edit(scene: Scene, world: World, rng: np.random.Generator, kind: str = "") -> Edit:
    """An edit of a kind drawn by lot among those that this scene allows, or of the given `kind` where it allows that.

    Held-out pairs of colour and shape stay out of the edited scene too.
    """
    for name in [kind] * bool(kind) + [list(KINDS)[i] for i in rng.permutation(len(KINDS))] + ["background"]:
        if (done := KINDS[name](scene, world, rng)) is not None:
            return Edit(name, [done[0][k] for k in rng.permutation(len(done[0]))], done[1])
    raise AssertionError("a new backdrop always fits")
