"""Novel views (Mildenhall et al. 2020, section 6.1): PSNR and SSIM of rendered against true pictures, and the error of distances where the data
know them.

LPIPS is measured where its network is handed in: a `decoders.perceptual.Perceptual` with published weights (`weights.lpips.load_perceptual`).
"""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.tasks.encode import Progress, frozen, name_of
from polysense.tasks.likeness import psnr, ssim
from polysense.tasks.result import Result, mean_of, metric


def run(subject: Any, test: Any, *, seed: int = 0, distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        progress: Progress | None = None) -> Result:
    """Means over the views of a source of rays (`cameras`: the whole pictures). distance: of two pictures [1,3,H,W] in [-1,1] -> [1]: lpips."""
    cameras = getattr(test, "cameras", None)
    if cameras is None:
        raise UserError(f"{test.name!r} offers rays, but no whole views", "use a source of posed views, such as solids")
    found: dict[str, list[float]] = {"psnr": [], "ssim": []}
    with frozen(subject.system):
        for v in range(len(cameras.image)):
            origin, direction = (torch.from_numpy(x).to(subject.device) for x in cameras.rays(v))
            truth = torch.from_numpy(cameras.image[v]).float()
            colour, depth = shown(subject.system, origin, direction)
            colour = colour.cpu().clamp(0, 1).view_as(truth)
            found["psnr"].append(psnr(colour, truth))
            found["ssim"].append(ssim(colour, truth))
            if distance is not None:
                found.setdefault("lpips", []).append(float(distance(*(x.permute(2, 0, 1)[None] * 2 - 1 for x in (colour, truth)))))
            if cameras.depth is not None and depth is not None:
                known = torch.from_numpy(cameras.depth[v]).flatten()
                hit = known.isfinite()
                found.setdefault("depth_error", []).append(float((depth.cpu()[hit] - known[hit]).abs().mean()))
            if progress:
                progress(v + 1, len(cameras.image))
    metrics = {k: metric(mean_of(np.array(v)), len(v), seed=seed) for k, v in found.items()}
    return Result("views", name_of(subject), test.name, len(cameras.image), metrics)


def shown(system: Any, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor | None]:
    """Colour [R,3], and mean distance [R] of systems that tell it."""
    if hasattr(system, "view"):
        seen = system.view(origin, direction)
        return seen.colour, seen.depth
    return system.render_view(origin, direction), None
