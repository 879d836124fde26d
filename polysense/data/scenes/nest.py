"""Things with parts: what a click means is ambiguous, as it is in photographs (a wheel, or the car).

One or two big things a scene; on each lie one or two parts, on some parts a part of their own. `masks` gives every whole with all that lies on
it, so the masks of a whole and of its parts overlap. Which thing lies on which is told by their places alone (`holders`).
"""
import numpy as np

from polysense.data.scenes.paint import Picture
from polysense.data.scenes.palette import contrast_of
from polysense.data.scenes.world import Scene, Thing, World

SOLID = ("circle", "square", "hexagon", "pentagon", "diamond", "ellipse", "trapezoid", "heart")      # wide in the middle: a part finds its place
PART = (0.44, 0.56)                          # radius of a part, in radii of what it lies on


def sample(world: World, rng: np.random.Generator) -> Scene:
    """A scene of one or two wholes with parts."""
    count, things = int(rng.integers(1, 3)), list[Thing]()
    for k in range(count):
        r = float(rng.uniform(0.2, 0.23) if count == 2 else rng.uniform(0.30, 0.40))
        x = rng.uniform(1.1 * r, 1 - 1.1 * r) if count == 1 else 0.26 + 0.48 * k + rng.uniform(-0.02, 0.02)
        y = rng.uniform(1.1 * r, 1 - 1.1 * r)
        whole = _thing(world, rng, float(x), float(y), r, 0.8 - 0.2 * k, ())
        things.append(whole)
        for side in _sides(rng):
            part = _on(world, rng, whole, side, 0.05)
            things.append(part)
            if part.r > 0.13 and rng.random() < 0.5:
                things.append(_on(world, rng, part, (0.0, 0.0), 0.02))
    return Scene(tuple(things), world.backdrop(rng, {t.colour for t in things}), world.light(rng))


def _sides(rng: np.random.Generator) -> list[tuple[float, float]]:
    """Where the parts of one whole lie, in its radii: one near the middle, or two on opposite sides."""
    turn = rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:
        return [(0.2 * np.cos(turn), 0.2 * np.sin(turn))]
    return [(0.42 * np.cos(turn), 0.42 * np.sin(turn)), (-0.42 * np.cos(turn), -0.42 * np.sin(turn))]


def _on(world: World, rng: np.random.Generator, below: Thing, side: tuple[float, float], nearer: float) -> Thing:
    r = float(rng.uniform(*PART)) * below.r * (1.0 if side != (0.0, 0.0) else 1.15) * (0.72 if np.hypot(*side) > 0.3 else 1.0)
    return _thing(world, rng, below.x + side[0] * below.r, below.y + side[1] * below.r, r, below.z - nearer, (below.colour,))


def _thing(world: World, rng: np.random.Generator, x: float, y: float, r: float, z: float, unlike: tuple[str, ...]) -> Thing:
    """A plain thing of a solid shape whose colour is clear of those in `unlike`."""
    pairs = [(c, s) for c, s in world.pairs() if s in SOLID and all(contrast_of(c, u) >= 0.19 for u in unlike)]
    pairs = pairs or [(c, s) for c, s in world.pairs() if c not in unlike] or list(world.pairs())
    colour, shape = pairs[rng.integers(len(pairs))]
    return Thing(shape, colour, "plain", "large" if r > 0.2 else "medium" if r > 0.11 else "small", float(x), float(y), r,
                 float(rng.uniform(-0.3, 0.3)), float(z), int(rng.integers(1 << 30)))


def holders(scene: Scene) -> list[int]:
    """For each thing, the number of the thing right below it, -1 for a whole: the nearest earlier one that it lies inside of."""
    out = []
    for i, t in enumerate(scene.things):
        below = [j for j, o in enumerate(scene.things[:i]) if np.hypot(t.x - o.x, t.y - o.y) + 0.5 * t.r < o.r and o.r > t.r]
        out.append(max(below, default=-1))
    return out


def masks(picture: Picture) -> np.ndarray:
    """bool [N,H,W]: each thing with all that lies on it."""
    out, holder = picture.masks(), holders(picture.scene)
    for i in reversed(range(len(holder))):
        if holder[i] >= 0:
            out[holder[i]] |= out[i]
    return out
