"""Outlines of masks as polygons with a fixed number of points, and the points that name a drawn thing's parts."""
from __future__ import annotations

import numpy as np

POINTS = 128                                 # of every polygon: what may be asked for with fewer takes every other one


def outline(mask: np.ndarray, points: int = POINTS) -> np.ndarray:
    """mask bool [H,W] -> the outline of its largest piece as `points` places x y in [0,1], evenly spaced along it, clockwise, beginning at
    its top; float32 [points,2], -1 throughout for an empty mask."""
    from contourpy import contour_generator

    if not mask.any():
        return np.full((points, 2), -1.0, np.float32)
    h, w = mask.shape
    lines = contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    line = max((np.asarray(one, float) for one in lines), key=lambda p: abs(_area(p)))
    line = line if _area(line) > 0 else line[::-1]                       # rows go down: a positive area is clockwise as seen
    line = np.roll(line[:-1], -int(line[:-1, 1].argmin()), 0)
    line = np.concatenate([line, line[:1]])
    along = np.concatenate([[0.0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()])
    at = np.arange(points) / points * along[-1]
    place = np.stack([np.interp(at, along, line[:, k]) for k in (0, 1)], 1)
    return ((place - 0.5) / (w, h)).clip(0, 1).astype(np.float32)        # the padding moved every pixel's middle from 0.5 to 1


def _area(line: np.ndarray) -> float:
    x, y = line.T
    return 0.5 * float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def outlines(masks: np.ndarray, points: int = POINTS) -> np.ndarray:
    """masks bool [...,H,W] -> [...,points,2]."""
    flat = masks.reshape(-1, *masks.shape[-2:])
    made = [outline(m, points) for m in flat]
    return np.stack(made).reshape(*masks.shape[:-2], points, 2) if made else np.zeros((*masks.shape[:-2], points, 2), np.float32)
