"""Posed photographs as camera rays: one sample is one pixel of one view.

Cameras have the axes of Blender and OpenGL: x right, y up, looking along -z; a pose is their matrix to the world. A pixel's ray passes
through its middle, and distances are measured along rays of unit direction.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from polysense.base.errors import UserError
from polysense.data.sources import Sample, Source, offered


@dataclass(frozen=True)
class Cameras:
    """V views: `image` float32 [V,H,W,3] in [0,1], `pose` [V,4,4] camera to world, `focal` in pixels, the principal point in the middle.
    `depth` [V,H,W] along the rays where it is known (inf: nothing there)."""
    image: np.ndarray
    pose: np.ndarray
    focal: float
    depth: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return int(self.image.shape[1]), int(self.image.shape[2])

    def rays(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Origin and unit direction of every pixel of a view, row by row: float32 [H*W,3] each."""
        return camera_rays(self.size, self.focal, self.pose[view])


def camera_rays(size: tuple[int, int], focal: float, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(height, width), focal length in pixels, pose [4,4] -> origin and unit direction [H*W,3], float32."""
    h, w = size
    x, y = np.meshgrid((np.arange(w) + 0.5 - w / 2) / focal, (np.arange(h) + 0.5 - h / 2) / focal)
    local = np.stack([x, -y, -np.ones_like(x)], -1).reshape(-1, 3)
    direction = local @ pose[:3, :3].T
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return np.broadcast_to(pose[:3, 3], direction.shape).astype(np.float32), direction.astype(np.float32)


def project(point: np.ndarray, size: tuple[int, int], focal: float, pose: np.ndarray) -> np.ndarray:
    """World points [N,3] -> column and row [N,2] in a view, the middle of the first pixel being 0, 0: the inverse of `camera_rays`."""
    local = (point - pose[:3, 3]) @ pose[:3, :3]
    return np.stack([focal * local[:, 0] / -local[:, 2] + size[1] / 2 - 0.5, -focal * local[:, 1] / -local[:, 2] + size[0] / 2 - 0.5], 1)


def look_at(position: np.ndarray, target: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """The pose [4,4] of a camera that looks at a target with the world's z upwards."""
    back = position - np.asarray(target, float)
    back = back / np.linalg.norm(back)
    right = np.cross((0.0, 0.0, 1.0), back)
    right = right / np.linalg.norm(right) if np.linalg.norm(right) > 1e-6 else np.array([1.0, 0.0, 0.0])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.stack([right, np.cross(back, right), back], 1), position
    return pose.astype(np.float32)


def around(turn: float, elevation: float, distance: float) -> np.ndarray:
    """The pose of a camera on a sphere around the origin: `turn` and `elevation` in radians."""
    return look_at(distance * np.array([np.cos(elevation) * np.cos(turn), np.cos(elevation) * np.sin(turn), np.sin(elevation)]))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Pictures [...,3 or 4], uint8 or float in [0,1], as float32 [...,3]: transparency is laid on white (straight alpha)."""
    values = rgba.astype(np.float32) / 255 if rgba.dtype == np.uint8 else rgba.astype(np.float32)
    return values if values.shape[-1] == 3 else values[..., :3] * values[..., 3:] + 1 - values[..., 3:]


class RaySource(Source):
    """All pixels of all views: sample i is pixel i in row order, view after view. `cameras` has the pictures whole, for exams."""

    def __init__(self, name: str, cameras: Cameras, split: str = "train"):
        v, (h, w) = len(cameras.image), cameras.size
        if cameras.image.shape != (v, h, w, 3) or cameras.pose.shape != (v, 4, 4) or not v:
            raise UserError(f"{name} has pictures {cameras.image.shape} and poses {cameras.pose.shape}", "they are [V,H,W,3] and [V,4,4]")
        self.name, self.split, self.cameras = name, split, cameras
        self.offers = offered(("origin", "direction", "rgb"))
        rays = [cameras.rays(k) for k in range(v)]
        self.origin, self.direction = (np.concatenate([r[i] for r in rays]) for i in (0, 1))
        self.rgb = cameras.image.reshape(-1, 3).astype(np.float32)

    def __len__(self) -> int:
        return len(self.rgb)

    def id(self, i: int) -> str:
        h, w = self.cameras.size
        return f"view {i // (h * w)}, row {i // w % h}, column {i % w}"

    def _about(self, i: int) -> Sample:
        return {"origin": self.origin[i], "direction": self.direction[i], "rgb": self.rgb[i]}


def npz_views(name: str, split: str, path: Any) -> RaySource:
    """An .npz of `{split}_images`, `{split}_poses` and `focal`."""
    with np.load(path) as d:
        return RaySource(name, Cameras(on_white(d[f"{split}_images"]), d[f"{split}_poses"], float(d["focal"])), split)
