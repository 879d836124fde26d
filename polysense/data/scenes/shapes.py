"""Signed distances of the shapes: negative inside, in units of the radius; x to the right, y down, the shape upright around 0."""
from collections.abc import Callable
from functools import lru_cache
from math import cos, pi, sin
from typing import cast

import numpy as np

from polysense.data.scenes.palette import SHAPES

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]            # x [H,W], y [H,W] -> distance [H,W], float32
REACH = 1.16                                                      # no shape goes beyond this many radii from its centre


def _polygon(*corners: tuple[float, float]) -> Field:
    """Exact distance to a simple polygon: nearest edge segment, sign by the parity of crossings of a ray to the right."""
    a = np.array(corners, np.float32)[:, :, None, None]
    e = np.roll(a, -1, 0) - a
    (ax, ay), (ex, ey) = (a[:, 0], a[:, 1]), (e[:, 0], e[:, 1])
    per_length2, slope = 1 / (ex ** 2 + ey ** 2), ex / np.where(ey == 0, 1, ey)
    top, bottom = np.minimum(ay, ay + ey), np.maximum(ay, ay + ey)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) * per_length2, 0, 1)
        near = np.sqrt(((px - along * ex) ** 2 + (py - along * ey) ** 2).min(0))
        inside = np.logical_xor.reduce((y >= top) & (y < bottom) & (px < py * slope), 0)
        return np.where(inside, -near, near)
    return distance


def _turns(count: int, radius: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when `inner` is given; the first corner points up."""
    steps = count if inner is None else 2 * count
    radii = [radius if inner is None or k % 2 == 0 else inner for k in range(steps)]
    return [(r * sin(2 * pi * k / steps), -r * cos(2 * pi * k / steps)) for k, r in enumerate(radii)]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.92


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.24


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 1.0, 0.82 - np.hypot(x - 0.48, y + 0.05))


def _semicircle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y - 0.42) - 1.05, y - 0.42)


def _ellipse(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """First-order distance f / |grad f|, exact on the outline."""
    a, b = 1.08, 0.56
    k = np.hypot(x / a, y / b)
    return k * (k - 1) / np.maximum(np.hypot(x / a ** 2, y / b ** 2), 1e-6)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Union of a square on its corner and two discs on its upper sides; exact outside."""
    x, side = np.abs(x), 0.6
    u, v = (x - y + 0.12) * 0.70710678, (x + y - 0.12) * 0.70710678            # along the upper right and the lower right side
    box = np.maximum(np.abs(u) - side, np.abs(v) - side)
    box = np.where(box > 0, np.hypot(np.maximum(np.abs(u) - side, 0), np.maximum(np.abs(v) - side, 0)), box)
    return np.minimum(box, np.hypot(u - side, v) - side)


FIELDS: dict[str, Field] = {
    "circle": _circle, "ring": _ring, "crescent": _crescent, "semicircle": _semicircle, "ellipse": _ellipse, "heart": _heart,
    "square": _polygon((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": _polygon(*((x, y + 0.1) for x, y in _turns(3, 1.1))),
    "star": _polygon(*_turns(5, 1.12, 0.46)),
    "pentagon": _polygon(*_turns(5, 1.0)),
    "hexagon": _polygon(*_turns(6, 1.0)),
    "diamond": _polygon((0, -1.12), (0.66, 0), (0, 1.12), (-0.66, 0)),
    "trapezoid": _polygon((-0.5, -0.6), (0.5, -0.6), (0.98, 0.6), (-0.98, 0.6)),
    "cross": _polygon((-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32), (0.32, 1), (-0.32, 1), (-0.32, 0.32),
                      (-1, 0.32), (-1, -0.32), (-0.32, -0.32)),
    "arrow": _polygon((-1.08, -0.27), (0.1, -0.27), (0.1, -0.75), (1.08, 0), (0.1, 0.75), (0.1, 0.27), (-1.08, 0.27)),
}
assert set(FIELDS) == set(SHAPES)


@lru_cache(maxsize=1)
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (UCI, Alpaydin & Kaynak 1998): ink [1797,8,8] in [0,1], class [1797]."""
    from sklearn.datasets import load_digits  # costs a second: only scenes with digits pay for it

    ink, classes = cast(tuple[np.ndarray, np.ndarray], load_digits(return_X_y=True))
    return (ink / 16).astype(np.float32).reshape(-1, 8, 8), classes.astype(np.int64)


@lru_cache(maxsize=1)
def _spline() -> np.ndarray:
    """[80, 8] weights that draw 8 samples, padded with emptiness, as 80 smooth ones (cubic, Mitchell & Netravali 1988, B = C = 1/3)."""
    where = (np.arange(80) + 0.5) / 8 - 1
    t = np.abs(where[:, None] - (np.arange(8) + 0.5))
    near, far = 7 * t ** 3 - 12 * t ** 2 + 16 / 3, -7 / 3 * t ** 3 + 12 * t ** 2 - 20 * t + 32 / 3
    return (np.where(t < 1, near, np.where(t < 2, far, 0)) / 6).astype(np.float32)


@lru_cache(maxsize=2048)
def _written(which: int) -> np.ndarray:
    """[80, 80] first-order signed distance (level - f) / |grad f| of one handwritten digit on [-1.25, 1.25]^2, in radii."""
    ink = _spline() @ handwriting()[0][which] @ _spline().T
    gy, gx = np.gradient(ink, 2.5 / 80)
    # Far from any ink the gradient vanishes: the floor keeps the distance finite there, the clip keeps it sane.
    return np.clip((0.5 - ink) / np.maximum(np.hypot(gx, gy), 0.6), -0.5, 0.6).astype(np.float32)


def _digit(which: int) -> Field:
    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        table = _written(which)
        cx, cy = np.clip((x + 1.25) * 32 - 0.5, 0, 78.999), np.clip((y + 1.25) * 32 - 0.5, 0, 78.999)
        ix, iy = cx.astype(np.int32), cy.astype(np.int32)
        fx, fy = cx - ix, cy - iy
        up = table[iy, ix] * (1 - fx) + table[iy, ix + 1] * fx
        return up * (1 - fy) + (table[iy + 1, ix] * (1 - fx) + table[iy + 1, ix + 1] * fx) * fy
    return distance


def field(shape: str, writing: int = -1) -> Field:
    """Signed distance function of a shape, or of the handwritten digit number `writing`."""
    return FIELDS[shape] if writing < 0 else _digit(writing)
