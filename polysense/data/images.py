"""Pictures of every kind to tensors: decoded to upright 8-bit RGB, resized as CLIP's own preprocessing does, normalised."""
from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from polysense.base.plan import ImagePlan
from polysense.data.sources import BadPicture

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".avif")
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
MOST_BYTES = 64 << 20                                   # of a picture behind an address
AT_LEAST: ContextVar[int | None] = ContextVar("AT_LEAST", default=None)     # what loaders set around reading, for `decode`'s at_least


def decode(item: Any, *, at_least: int | None = None) -> Image.Image:
    """A path, http(s) address, encoded bytes, PIL picture or array -> upright 8-bit RGB picture.

    Arrays: [H,W] or [H,W,1|3|4], uint8, uint16, or float in [0,1]; tensors the same, or [3,H,W]. The EXIF rotation is applied,
    transparency is laid on white, 16-bit values are scaled down, CMYK and palettes are converted. With `at_least`, a JPEG may be
    decoded at a reduced scale whose shorter side is still that many pixels or more (much faster for photographs).
    Raises BadPicture (a UserError) for anything that is not a whole picture.
    """
    name = item if isinstance(item, (str, Path)) else type(item).__name__
    try:
        picture, at_least = _open(item), at_least or AT_LEAST.get()
        if at_least and picture.format == "JPEG" and min(picture.size) > 2 * at_least:
            scale = max(1, min(picture.size) // at_least)
            picture.draft("RGB", (max(1, picture.width // scale), max(1, picture.height // scale)))
        picture.load()
    except BadPicture:
        raise
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise anything on damaged bytes
        raise BadPicture(f"cannot read the picture {str(name)!r}", f"{type(error).__name__}: {error}") from error
    return to_rgb(picture)


def _open(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, (bytes, bytearray, memoryview)):
        if not len(item):
            raise BadPicture("the picture has no bytes", "the file is empty")
        return Image.open(BytesIO(item))
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        item = (item.permute(1, 2, 0) if item.ndim == 3 and item.shape[0] in (1, 3) and item.shape[-1] not in (1, 3) else item).numpy()
    if isinstance(item, np.ndarray):
        return _of_array(item)
    if isinstance(item, (str, Path)):
        if str(item).startswith(("http://", "https://")):
            return _open(_download(str(item)))
        path = Path(item).expanduser()
        if not path.exists():
            raise BadPicture(f"no file {str(item)!r}", "check the path")
        if path.is_file() and path.stat().st_size == 0:
            raise BadPicture(f"{str(item)!r} has no bytes", "the file is empty")
        return Image.open(path)
    raise BadPicture(f"cannot make a picture of {type(item).__name__}", "give a path, an address, bytes, a PIL picture or an array")


def _of_array(a: np.ndarray) -> Image.Image:
    if a.ndim == 3 and a.shape[-1] == 1:
        a = a[..., 0]
    if a.ndim not in (2, 3) or (a.ndim == 3 and a.shape[-1] not in (3, 4)) or 0 in a.shape:
        raise BadPicture(f"an array of shape {a.shape} is no picture", "it should be [H, W] or [H, W, 3]")
    if a.dtype == np.uint16:
        a = (a / 257.0).round().astype(np.uint8)
    elif a.dtype == bool:
        a = a.astype(np.uint8) * 255
    elif np.issubdtype(a.dtype, np.floating):
        a = (np.nan_to_num(a).clip(0, 1) * 255).round().astype(np.uint8)
    elif a.dtype != np.uint8:
        a = a.clip(0, 255).astype(np.uint8)
    return Image.fromarray(a)


def _download(address: str) -> bytes:
    try:
        with urlopen(Request(address, headers={"User-Agent": "polysense"}), timeout=30) as reply:
            data = reply.read(MOST_BYTES + 1)
    except OSError as error:
        raise BadPicture(f"cannot fetch {address!r}", str(error)) from error
    if len(data) > MOST_BYTES:
        raise BadPicture(f"{address!r} is larger than {MOST_BYTES >> 20} MB", "download and shrink it first")
    return data


def to_rgb(picture: Image.Image) -> Image.Image:
    """Upright 8-bit RGB, whatever the mode was."""
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:
        pass
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        top = values.max(initial=0)
        # Range by content, as these modes carry none: [0, 1] floats, 8-bit and 16-bit integers are all in use.
        by = 255.0 if picture.mode == "F" and top <= 1 else 1.0 if top <= 255 else 1 / 257
        picture = Image.fromarray((values * by).round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def fit(picture: Image.Image, plan: ImagePlan, resample: str | None = None, place: float = 0.5) -> Image.Image:
    """Resized and cropped to plan.size x plan.size pixels, antialiased: torchvision's Resize + CenterCrop, as CLIP reads pictures;
    with fit="pad" padded to a square with the mean colour first (LLaVA-1.5), with "corner" resized by the longer side, then padded (SAM).

    place: where along the longer side fit="crop" cuts, from 0 (left or top) to 1."""
    how, size = RESAMPLE[resample or plan.resample], plan.size
    if plan.fit == "pad":
        side = max(picture.size)
        ground = Image.new(picture.mode, (side, side), tuple(round(255 * m) for m in plan.mean) if picture.mode == "RGB" else 0)
        ground.paste(picture, _corner(picture.size))
        return ground.resize((size, size), how)
    if plan.fit == "corner":
        w, h = longest_to(picture.size, size)
        ground = Image.new(picture.mode, (size, size), tuple(round(255 * m) for m in plan.mean) if picture.mode == "RGB" else 0)
        ground.paste(picture if picture.size == (w, h) else picture.resize((w, h), how))
        return ground
    if plan.fit == "squash":
        return picture if picture.size == (size, size) else picture.resize((size, size), how)
    w, h = resized_to(picture.size, size)
    if picture.size != (w, h):
        picture = picture.resize((w, h), how)
    left, top = round((w - size) * place), round((h - size) * place)
    return picture if (w, h) == (size, size) else picture.crop((left, top, left + size, top + size))


def resized_to(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) with the shorter side at `short`, the longer one rounded down (torchvision's rule)."""
    w, h = size
    return (short, max(short, int(short * h / w))) if w <= h else (max(short, int(short * w / h)), short)


def longest_to(size: tuple[int, int], long: int) -> tuple[int, int]:
    """(width, height) with the longer side at `long`, the shorter one rounded."""
    w, h = size
    return (long, max(1, int(h * long / w + 0.5))) if w >= h else (max(1, int(w * long / h + 0.5)), long)


def window(size: tuple[int, int], plan: ImagePlan) -> tuple[float, float, float, float]:
    """The part of a picture of (width, height) that `fit` keeps, as x0 y0 x1 y1 in [0, 1]; beyond them where it pads."""
    if plan.fit == "squash":
        return 0.0, 0.0, 1.0, 1.0
    if plan.fit == "pad":
        (x, y), side = _corner(size), max(size)
        return -x / size[0], -y / size[1], (side - x) / size[0], (side - y) / size[1]
    if plan.fit == "corner":
        w, h = longest_to(size, plan.size)
        return 0.0, 0.0, plan.size / w, plan.size / h
    w, h = resized_to(size, plan.size)
    left, top = round((w - plan.size) / 2), round((h - plan.size) / 2)
    return left / w, top / h, (left + plan.size) / w, (top + plan.size) / h


def _corner(size: tuple[int, int]) -> tuple[int, int]:
    """Where a picture's upper left corner lies in the square that it is padded to."""
    side = max(size)
    return (side - size[0]) // 2, (side - size[1]) // 2


def pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [H,W,3]."""
    return np.asarray(picture, dtype=np.uint8)


def normalised(image: Tensor, plan: ImagePlan) -> Tensor:
    """image uint8 [B,H,W,3] or float [B,3,H,W] in [0,1] -> float32 [B,3,H,W] with the plan's mean and standard deviation."""
    if image.dtype == torch.uint8:
        image = image.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=image.device).view(1, -1, 1, 1) for v in (plan.mean, plan.std))
    return (image - mean) / std


def read_images(plan: ImagePlan, items: Sequence[Any]) -> Tensor:
    """Pictures (anything `decode` takes) -> float32 [B,3,H,W], resized, cropped and normalised as the plan says. Raises BadPicture."""
    if not items:
        return torch.empty(0, 3, plan.size, plan.size)
    return normalised(torch.from_numpy(np.stack([pixels(fit(decode(item), plan)) for item in items])), plan)
