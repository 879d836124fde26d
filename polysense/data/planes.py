"""Maps of one channel from files: distances and heat."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polysense.base.plan import ImagePlan
from polysense.data.images import fit
from polysense.data.sources import BadPicture

ENDINGS = (".npy", ".png", ".tif", ".tiff")
MILLIMETRES = 1000.0                                    # of sixteen-bit pictures: what depth cameras write


def read_plane(item: Any, of: str = "depth") -> np.ndarray:
    """A path or an array [H,W] -> float32 [H,W]. Numbers of .npy files, of float pictures and of float arrays stay as they are; sixteen-bit pictures
    of "depth" are millimetres and become metres, other whole numbers become shares of the largest that their type holds.

    Raises BadPicture (a UserError) for anything else, and for numbers that are not finite.
    """
    name = str(item) if isinstance(item, (str, Path)) else "array"
    try:
        plane = np.load(item, allow_pickle=False) if name.lower().endswith(".npy") else np.asarray(Image.open(item)) if name != "array" else item
        plane = np.asarray(plane)
    except MemoryError:
        raise
    except Exception as error:  # Pillow and numpy raise their own and others on damaged files
        raise BadPicture(f"cannot read the map {name!r}", f"{type(error).__name__}: {error}") from error
    if plane.ndim != 2 or not plane.size or plane.dtype.kind not in "fiu":
        raise BadPicture(f"{name!r} holds {plane.dtype} of shape {list(plane.shape)}", "a map has one channel: numbers [H,W]")
    if plane.dtype.kind == "f":
        out = plane.astype(np.float32)
    elif plane.dtype.itemsize == 1:
        out = plane.astype(np.float32) / np.iinfo(plane.dtype).max
    else:                                               # Pillow gives sixteen bits as wider whole numbers, too
        out = plane.astype(np.float32) / (MILLIMETRES if of == "depth" else 65535.0)
    if not np.isfinite(out).all():
        raise BadPicture(f"{name!r} holds numbers that are not finite", "write 0 where nothing is known")
    return out


def read_planes(plan: ImagePlan, items: list[Any], of: str = "depth") -> np.ndarray:
    """Maps -> float32 [B,1,size,size], fitted as pictures are, bilinear, their numbers unchanged."""
    return np.stack([np.asarray(fit(Image.fromarray(read_plane(i, of)), plan, "bilinear"), np.float32) for i in items])[:, None]
