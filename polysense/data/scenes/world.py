"""What is in a scene, as values, and how one is drawn by lot. Coordinates: the picture is the unit square, x right, y down."""
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from polysense.data.scenes.palette import (
    BACKDROP_KINDS,
    BACKDROPS,
    COLOURS,
    DIGITS,
    SHAPES,
    SIZES,
    TEXTURES,
    clear_on,
    contrast,
    heldout_pairs,
)
from polysense.data.scenes.shapes import field, handwriting

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Thing:
    """One object. `shape` is a name of `palette.THINGS`; a digit's `writing` is its row in `handwriting()`, else -1."""
    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    r: float
    angle: float                             # radians, clockwise as seen
    z: float                                 # depth, 0 near to 1 far; things are painted from far to near
    seed: int                                # of its texture
    writing: int = -1


@dataclass(frozen=True)
class Backdrop:
    colour: str
    kind: str
    angle: float
    seed: int


@dataclass(frozen=True)
class Light:
    angle: float                             # where the light comes from
    shade: float                             # strength of the directional shading, 0 to 0.4
    brightness: float
    vignette: float                          # how much darker the corners are
    shadow: float                            # opacity of the soft shadow that each thing casts


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]                # far to near
    backdrop: Backdrop
    light: Light

    def but(self, index: int, **changes: object) -> "Scene":
        """The same scene with one thing changed."""
        return replace(self, things=tuple(replace(t, **changes) if i == index else t for i, t in enumerate(self.things)))  # type: ignore[arg-type]


def relation(a: Thing, b: Thing) -> str:
    """`a` is `left of`, `right of`, `above` or `below` `b`; "" where neither axis clearly wins."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.5 * abs(dy) and abs(dx) > 0.15:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx) and abs(dy) > 0.15:
        return "above" if dy < 0 else "below"
    return ""


@cache
def _samples() -> tuple[np.ndarray, np.ndarray]:
    x, y = np.meshgrid(np.linspace(-1.2, 1.2, 25, dtype=np.float32), np.linspace(-1.2, 1.2, 25, dtype=np.float32))
    return x, y


def local(t: Thing, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picture coordinates -> the thing's own (upright, in radii)."""
    c, s = np.float32(np.cos(t.angle) / t.r), np.float32(np.sin(t.angle) / t.r)
    x, y = x - np.float32(t.x), y - np.float32(t.y)
    return c * x + s * y, c * y - s * x


def hides(front: Thing, back: Thing) -> float:
    """The share of `back` that `front` would cover, by samples that do not depend on any picture size."""
    if np.hypot(front.x - back.x, front.y - back.y) > 1.16 * (front.r + back.r):
        return 0.0
    x, y = _samples()
    own = field(back.shape, back.writing)(*local(back, back.x + back.r * x, back.y + back.r * y)) < 0
    over = field(front.shape, front.writing)(*local(front, back.x + back.r * x, back.y + back.r * y)) < 0
    return float((own & over).sum() / max(own.sum(), 1))


@dataclass(frozen=True)
class World:
    """The lot that scenes are drawn by. `combos`: "seen" (no held-out pair), "heldout" (only those) or "all"."""
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    combos: str = "seen"
    least: int = 1
    most: int = 4
    digits: float = 0.12                     # chance that a thing is a handwritten digit
    style: str = "rich"                      # "plain": flat colours on white, light grey or black, no light
    split: str = "train"                     # train, val and test draw from different handwriting
    alike: float = 0.3                       # chance of a scene with several things of one kind
    sizes: tuple[str, ...] = tuple(SIZES)    # what is too large for the room that is left becomes the next smaller of them

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The (colour, shape) pairs that may appear."""
        return _pairs(self.shapes, self.colours, self.combos)

    def kind(self, rng: np.random.Generator) -> tuple[str, str, int]:
        """A (colour, shape, writing)."""
        if rng.random() < self.digits:
            rows = _writings(self.split)
            which = int(rows[rng.integers(len(rows))])
            return self.colours[rng.integers(len(self.colours))], DIGITS[handwriting()[1][which]], which
        pairs = self.pairs()
        return (*pairs[rng.integers(len(pairs))], -1)

    def sample(self, rng: np.random.Generator) -> Scene:
        """A scene of `least` to `most` things, all in view, none hidden by more than about half."""
        count = int(rng.integers(self.least, self.most + 1))
        kinds = [self.kind(rng) for _ in range(count)]
        if count > 1 and rng.random() < self.alike:
            same = int(rng.integers(2, count + 1))
            kinds[:same] = [kinds[0]] * same
        overlap = count > 1 and kinds[0][0] != kinds[1][0] and rng.random() < 0.35
        depths = np.sort(rng.uniform(0.08, 0.85, count))[::-1]
        things: list[Thing] = []
        for i, kind in enumerate(kinds):
            beside = things[0] if overlap and i == 1 and things else None
            t = self.place(rng, kind, things, float(depths[i]), crowd=count, beside=beside)
            if beside is not None and (t is None or hides(t, beside) > 0.5):
                t = self.place(rng, kind, things, float(depths[i]), crowd=count)
            if t is not None:
                things.append(t)
        return Scene(tuple(things), self.backdrop(rng, {t.colour for t in things}), self.light(rng))

    def place(self, rng: np.random.Generator, kind: tuple[str, str, int], others: list[Thing], z: float, *, crowd: int = 1,
              beside: Thing | None = None) -> Thing | None:
        """A thing of this kind at a free place, smaller where it is crowded; None where no place is free."""
        colour, shape, writing = kind
        names = tuple(s for s in SIZES if s in self.sizes and (writing < 0 or s != "small")) or ("medium",)
        first = int(rng.integers(len(names) if crowd < 4 else max(1, len(names) - 1)))
        texture = ("plain", *TEXTURES)[rng.integers(len(TEXTURES) + 1)] if self.style == "rich" else "plain"
        angle = 0.0 if writing >= 0 else float(rng.uniform(-0.3, 0.3))
        if shape == "arrow":
            angle += float(rng.integers(4)) * np.pi / 2
        for size in reversed(names[:first + 1]):
            r = float(rng.uniform(*SIZES[size]))
            edge = 1.16 * r + 0.005
            spots = edge + (1 - 2 * edge) * rng.random((24, 2))
            if beside is not None:
                turn, far = rng.uniform(0, 2 * np.pi, 24), rng.uniform(0.68, 0.85, 24) * (r + beside.r)
                spots = np.stack([beside.x + far * np.cos(turn), beside.y + far * np.sin(turn)], 1)
            free = ((spots >= edge) & (spots <= 1 - edge)).all(1)
            for o in others:
                if o is not beside:
                    free &= np.hypot(spots[:, 0] - o.x, spots[:, 1] - o.y) > 1.1 * (r + o.r) + 0.01
            if free.any():
                x, y = spots[int(free.argmax())]
                # Small things and digits are too thin to show a texture at 64 px: what is said must be visible.
                texture = "plain" if size == "small" or writing >= 0 else texture
                return Thing(shape, colour, texture, size, float(x), float(y), r, angle, z, int(rng.integers(1 << 30)), writing)
        return None

    def backdrop(self, rng: np.random.Generator, colours: set[str], *, avoid: str = "") -> Backdrop:
        """A backdrop on which all these colours stand out (the best there is, if none)."""
        names = [b for b in (BACKDROPS if self.style == "rich" else ("white", "light grey", "black")) if b != avoid]
        clear = [b for b in names if colours <= set(clear_on(b))] or [max(names, key=lambda b: min(contrast(c, b) for c in colours))]
        kinds = tuple(BACKDROP_KINDS) if self.style == "rich" else ("plain",)
        return Backdrop(clear[rng.integers(len(clear))], kinds[rng.integers(len(kinds))], float(rng.uniform(0, 2 * np.pi)),
                        int(rng.integers(1 << 30)))

    def light(self, rng: np.random.Generator) -> Light:
        a, shade, bright, vignette, shadow = rng.random(5)
        if self.style == "plain":
            return Light(0.0, 0.0, 1.0, 0.0, 0.0)
        return Light(float(2 * np.pi * a), 0.4 * float(shade), 0.85 + 0.25 * float(bright), max(0.0, 0.8 * float(vignette) - 0.35),
                     max(0.0, 0.9 * float(shadow) - 0.35))


@cache
def _pairs(shapes: tuple[str, ...], colours: tuple[str, ...], combos: str) -> tuple[tuple[str, str], ...]:
    held = heldout_pairs()
    return tuple((c, s) for c in colours for s in shapes if combos == "all" or ((c, s) in held) == (combos == "heldout"))


@cache
def _writings(split: str) -> np.ndarray:
    """Rows of the handwritten digits for a split: every fifth is for test, every fifth for val, the rest for train."""
    fold = np.arange(len(handwriting()[1])) % 5
    return np.flatnonzero(fold == {"test": 0, "val": 1}[split] if split != "train" else fold > 1)
