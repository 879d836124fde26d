"""Looking at a learned scene: a camera that goes around it."""
from __future__ import annotations

from math import pi, radians, tan
from typing import Any

import numpy as np
import torch
from PIL import Image

from polysense.base.errors import UserError
from polysense.data.rays import around, camera_rays
from polysense.train.precision import autocast


def render(pipeline: Any, turn: int = 1, elevation: float = 30.0, size: int = 100, start: float = 0.0, distance: float | None = None,
           fov: float | None = None) -> list[Image.Image]:
    """See `Pipeline.render`."""
    pipeline._need("render_view")
    if turn < 1 or not 2 <= size <= 4096 or not -89 <= elevation <= 89:
        raise UserError(f"turn={turn}, size={size}, elevation={elevation:g}", "at least one view, 2 to 4096 pixels, -89 to 89 degrees")
    system = pipeline.system
    away, wide = distance or getattr(system, "distance", 4.0), fov or getattr(system, "fov", 0.69)
    if away <= 0 or not 0 < wide < pi:
        raise UserError(f"distance={away:g}, fov={wide:g}", "a distance above 0 and an angle between 0 and pi")
    out = []
    for k in range(turn):
        pose = around(radians(start) + 2 * pi * k / turn, radians(elevation), away)
        origin, direction = (torch.from_numpy(v).to(pipeline.device) for v in camera_rays((size, size), size / 2 / tan(wide / 2), pose))
        with torch.inference_mode(), autocast("fp32", pipeline.device)(True):
            colour = system.render_view(origin, direction).float().cpu()
        if not colour.isfinite().all():
            raise UserError("render_view returned numbers that are not finite", "the weights are damaged, or their training diverged")
        out.append(Image.fromarray((colour.view(size, size, 3).clamp(0, 1) * 255).round().numpy().astype(np.uint8)))
    return out


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size beside each other, in rows of about equal number."""
    columns = min(len(pictures), max(1, round(len(pictures) ** 0.5 * 1.5)))
    w, h = pictures[0].size
    out = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h), "white")
    for i, picture in enumerate(pictures):
        out.paste(picture, (i % columns * w, i // columns * h))
    return out
