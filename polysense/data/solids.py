"""The source `solids`: a ball, a cube and a column on a white ground, partly glossy, traced exactly; colour and distance of every ray are known.

`solids?views=30&size=40&seed=0`: `views` cameras around the scene (6 in the test split, between those of training), `size` pixels a side.
"""
from __future__ import annotations

import numpy as np

from polysense.base.errors import UserError
from polysense.data.rays import Cameras, RaySource, around

DISTANCE, FOV = 4.0, 0.6911112               # of the cameras; the field of view of the Blender scenes
LIGHT = np.array([0.45, 0.25, 0.86]) / np.linalg.norm([0.45, 0.25, 0.86])
BALL, BALL_AT, CUBE, CUBE_AT, COLUMN, COLUMN_AT = 0.5, np.array([0.45, 0.35, 0.0]), 0.4, np.array([-0.5, 0.3, -0.1]), (0.3, 0.55), (0.05, -0.55)
COLOURS = np.array([[0.85, 0.15, 0.12], [0.15, 0.35, 0.85], [0.95, 0.75, 0.1]])
GLOSS = np.array([0.6, 0.0, 0.35])           # of ball, cube and column


def trace(origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """origin, unit direction [R,3] -> colour [R,3] in [0,1] on white, and distance [R] (inf where nothing is hit)."""
    o, d = origin.astype(float), direction.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        hits = [_ball(o, d), _cube(o, d), _column(o, d)]
        at = np.stack([t for t, _ in hits])
        which = at.argmin(0)
        distance = at.min(0)
        normal = np.stack([n for _, n in hits])[which, np.arange(len(o))]
        seen = np.isfinite(distance)
        base = COLOURS[which] * np.where((which == 1) & _checks(o + distance[:, None] * d), 0.55, 1.0)[:, None]
        lit = 0.35 + 0.65 * np.clip(normal @ LIGHT, 0, None)
        half = LIGHT - d
        shine = GLOSS[which] * np.clip((normal * half).sum(1) / np.linalg.norm(half, axis=1), 0, None) ** 24
        colour = np.clip(base * lit[:, None] + shine[:, None], 0, 1)
    return np.where(seen[:, None], colour, 1.0).astype(np.float32), distance.astype(np.float32)


def _first(near: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid & (near > 1e-6), near, np.inf)


def _ball(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = o - BALL_AT
    b, c = (p * d).sum(1), (p * p).sum(1) - BALL ** 2
    inside = b * b - c
    t = _first(-b - np.sqrt(np.maximum(inside, 0)), inside > 0)
    return t, (p + np.where(np.isfinite(t), t, 0)[:, None] * d) / BALL


def _cube(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = o - CUBE_AT
    one, two = (-CUBE - p) / d, (CUBE - p) / d
    low, high = np.fmin(one, two), np.fmax(one, two)
    enter, axis = low.max(1), low.argmax(1)
    normal = np.zeros_like(d)
    normal[np.arange(len(d)), axis] = -np.sign(d[np.arange(len(d)), axis])
    return _first(enter, enter < high.min(1)), normal


def _column(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An upright cylinder: its mantle, or one of its ends."""
    radius, half = COLUMN
    p = o - np.array([*COLUMN_AT, 0.0])
    a, b, c = (d[:, :2] ** 2).sum(1), (p[:, :2] * d[:, :2]).sum(1), (p[:, :2] ** 2).sum(1) - radius ** 2
    inside = b * b - a * c
    t = (-b - np.sqrt(np.maximum(inside, 0))) / a
    z = p[:, 2] + t * d[:, 2]
    mantle = _first(t, (inside > 0) & (np.abs(z) < half))
    end = (np.sign(-d[:, 2]) * half - p[:, 2]) / d[:, 2]
    there = p[:, :2] + end[:, None] * d[:, :2]
    end = _first(end, (there ** 2).sum(1) < radius ** 2)
    side = np.concatenate([(p[:, :2] + np.where(np.isfinite(mantle), mantle, 0)[:, None] * d[:, :2]) / radius, np.zeros((len(o), 1))], 1)
    top = np.stack([np.zeros(len(o)), np.zeros(len(o)), np.sign(-d[:, 2])], 1)
    return np.minimum(mantle, end), np.where((end < mantle)[:, None], top, side)


def _checks(point: np.ndarray) -> np.ndarray:
    """A pattern on the cube: where it is dark."""
    return (np.floor(np.where(np.isfinite(point), point - CUBE_AT, 0) / 0.2 + 0.5).sum(1) % 2).astype(bool)


def poses(views: int, split: str, seed: int) -> np.ndarray:
    """[V,4,4]: cameras on a spiral over the upper half, those of other splits turned in between."""
    lot = np.random.default_rng([seed, ("train", "val", "test").index(split)])
    k = np.arange(views) + (0.5 if split != "train" else 0.0)
    turn = k * 2.399963 + (0.7 if split == "val" else 0.0) + lot.uniform(-0.1, 0.1, views)
    height = 0.12 + 0.75 * ((k + 0.5) / (views + 0.5)) + lot.uniform(-0.03, 0.03, views)
    return np.stack([around(t, float(np.arcsin(np.clip(h, 0.02, 0.95))), DISTANCE) for t, h in zip(turn, height, strict=True)])


def solids_source(options: dict[str, str], split: str = "train") -> RaySource:
    """The source that `solids?...` names. Raises UserError for an unknown option, split or a number out of range."""
    split, values = {"dev": "val"}.get(split, split), {"views": 30 if split == "train" else 6, "size": 40, "seed": 0}
    if split not in ("train", "val", "test"):
        raise UserError(f"solids have no split {split!r}", "choose train, val, test")
    for key, text in options.items():
        if key not in values or not text.isdigit():
            raise UserError(f"cannot read {key}={text} of solids", f"the options are {', '.join(values)}, whole numbers")
        if key != "views" or split == "train":                 # other splits keep their six
            values[key] = int(text)
    if not 1 <= values["views"] <= 1000 or not 4 <= values["size"] <= 1024:
        raise UserError(f"solids of {values['views']} views and {values['size']} pixels", "views go from 1 to 1000, sizes from 4 to 1024")
    size, pose = values["size"], poses(values["views"], split, values["seed"])
    focal = size / 2 / np.tan(FOV / 2)
    blank = Cameras(np.zeros((len(pose), size, size, 3), np.float32), pose, focal)
    seen = [trace(*blank.rays(v)) for v in range(len(pose))]
    image, depth = (np.stack([s[i] for s in seen]).reshape(len(pose), size, size, *tail) for i, tail in ((0, (3,)), (1, ())))
    name = "solids" + ("?" + "&".join(f"{k}={v}" for k, v in options.items()) if options else "")
    return RaySource(name, Cameras(image, pose, focal, depth), split)
