"""Outlines and boxes from files: prompts in the coordinates of the picture as it is, masks at its own size."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.images import decode, window
from polysense.pipeline.heat import Detection
from polysense.train.precision import autocast

LAST: WeakKeyDictionary[Any, tuple[np.ndarray, Tensor]] = WeakKeyDictionary()        # pixels of a pipeline's last picture, and as it was read
Place = tuple[float, float]
Box = tuple[float, float, float, float]
COLOURS = ((255, 64, 64), (64, 160, 255), (255, 200, 32), (96, 220, 96), (220, 96, 255), (32, 220, 220))


@dataclass(frozen=True)
class Segmentation:
    """What a prompt may mean, the most likely first: `masks` bool [M,H,W] at the size of `image`, `scores` their predicted IoU."""
    image: Image.Image
    masks: np.ndarray
    scores: tuple[float, ...]
    points: tuple[tuple[float, float, int], ...] = ()          # x y in [0,1] and 1 (inside) or 0
    box: Box | None = None

    @property
    def mask(self) -> np.ndarray:
        """The best one, bool [H,W]."""
        return self.masks[0]

    def boxes(self) -> list[Box | None]:
        """The extent of each mask in [0, 1]; None where it is empty."""
        out: list[Box | None] = []
        for mask in self.masks:
            (h, w), rows, columns = mask.shape, np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            out.append((columns[0] / w, rows[0] / h, (columns[-1] + 1) / w, (rows[-1] + 1) / h) if len(rows) else None)
        return out

    def overlay(self, which: int = 0, strength: float = 0.5) -> Image.Image:
        """The picture with one mask in colour, its outline, and what was asked."""
        drawn = painted(self.image, self.masks[which], COLOURS[which % len(COLOURS)], strength)
        pen, (w, h) = ImageDraw.Draw(drawn), drawn.size
        r = max(2, min(w, h) // 80)
        for x, y, inside in self.points:
            pen.ellipse((x * w - r, y * h - r, x * w + r, y * h + r), fill=(32, 200, 64) if inside else (220, 32, 32), outline="white")
        if self.box:
            pen.rectangle(tuple(v * s for v, s in zip(self.box, (w, h, w, h), strict=True)), outline=(32, 200, 64), width=max(1, r // 2))
        return drawn

    def to_json(self) -> dict[str, Any]:
        shares = self.masks.reshape(len(self.masks), -1).mean(1)
        return {"size": list(self.image.size), "masks": [
            {"score": s, "share": float(share), "box": None if b is None else [float(v) for v in b]}
            for s, share, b in zip(self.scores, shares, self.boxes(), strict=True)]}


def painted(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], strength: float) -> Image.Image:
    """The picture with a mask [H,W] mixed in and its outline drawn."""
    base, m = np.asarray(image.convert("RGB"), np.float32), mask.astype(np.float32)[..., None]
    mixed = base * (1 - strength * m) + np.asarray(colour, np.float32) * strength * m
    inner = np.pad(mask, 1)
    edge = mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])
    mixed[edge] = colour
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def segment(pipeline: Any, image: Any, points: Sequence[Place] = (), labels: Sequence[int] | None = None, box: Box | None = None,
            text: str | None = None) -> Segmentation:
    """See `Pipeline.segment`."""
    pipeline._need("segment")
    if not len(points) and box is None and text is None:
        raise UserError("nothing says what to segment", "give points, a box or a text")
    if text is not None and (len(points) or box is not None):
        raise UserError("a text is a prompt of its own", "give it alone, or give points and a box")
    labels = [1] * len(points) if labels is None else list(labels)
    if len(labels) != len(points) or any(v not in (0, 1) for v in labels):
        raise UserError(f"{len(labels)} labels for {len(points)} points", "one for each, 1 inside and 0 outside")
    picture, plan, system = decode(image), pipeline._image_plan(), pipeline.system
    frame = window(picture.size, plan)
    tensor = read_again(pipeline, picture)
    with torch.inference_mode(), autocast("auto", pipeline.device)(True):
        if text is not None:
            if not hasattr(system, "segment_text") or pipeline.tokenizer is None:
                raise UserError(f"{pipeline.id or 'this system'} does not read words", "give points or a box")
            logits, score = system.segment_text(tensor, pipeline.read_texts([text])[None])
        else:
            where = [[np.floor(v * plan.size) / plan.size for v in inside(frame, p)] for p in points]        # a pixel, by its corner
            corners = [*inside(frame, box[:2]), *inside(frame, box[2:])] if box is not None else None
            if corners and (corners[0] >= corners[2] or corners[1] >= corners[3]):
                raise UserError(f"the box {box} has no inside", "give x0 y0 x1 y1 with x0 < x1 and y0 < y1")
            make = lambda value, kind=torch.float32: torch.tensor([[value]], dtype=kind, device=pipeline.device)
            logits, score = system.segment(tensor, make(where) if where else None, make(labels, torch.long) if where else None,
                                           make(corners) if corners else None)
    logits, score = logits[0, 0].float(), score[0, 0].float()
    if not (logits.isfinite().all() and score.isfinite().all()):
        raise UserError("segment returned numbers that are not finite", "the weights are damaged, or their training diverged")
    order = score.argsort(descending=True)
    masks = unframed(logits[order], picture.size, frame) > 0
    return Segmentation(picture, masks.cpu().numpy(), tuple(score[order].tolist()),
                        tuple((float(x), float(y), v) for (x, y), v in zip(points, labels, strict=True)), box)


def inside(frame: Box, place: Sequence[float]) -> list[float]:
    """x y of the picture in the part of it that the system reads; UserError where it lies outside."""
    x, y = place
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise UserError(f"the place {x:g},{y:g} is not in the picture", "coordinates are fractions from 0 to 1, x before y")
    out = [(x - frame[0]) / (frame[2] - frame[0]), (y - frame[1]) / (frame[3] - frame[1])]
    if not all(-1e-6 <= v <= 1 + 1e-6 for v in out):
        raise UserError(f"the place {x:g},{y:g} is outside the middle square that this system reads", "crop the picture around it")
    return [min(max(v, 0.0), 1 - 1e-6) for v in out]


def read_again(pipeline: Any, picture: Image.Image) -> Tensor:
    """`pipeline.read_images([picture])`, remembered for the next prompt on the same picture, as resizing costs as much as a prompt does. Pixels are
    compared."""
    pixels, last = np.asarray(picture), LAST.get(pipeline)
    if last is None or last[0].shape != pixels.shape or not np.array_equal(last[0], pixels):
        last = LAST[pipeline] = pixels.copy(), pipeline.read_images([picture])
    return last[1]


def unframed(logits: Tensor, size: tuple[int, int], frame: Box) -> Tensor:
    """Maps [M,h,w] over the frame that was read -> [M,H,W] over a picture of (width, height), bilinear; far below zero outside the frame.

    Columns first, while there are few rows; the rows are then copied whole.
    """
    along = [((torch.arange(n, device=logits.device) + 0.5) / n - low) / (high - low)
             for n, low, high in zip(size, frame[:2], frame[2:], strict=True)]
    out = logits
    for axis, place in zip((2, 1), along, strict=True):
        n = logits.shape[axis]
        at = (place * n - 0.5).clamp(0, n - 1)
        left = at.long().clamp(max=max(0, n - 2))
        share = (at - left).to(out.dtype)
        out = torch.lerp(out.index_select(axis, left), out.index_select(axis, (left + 1).clamp(max=n - 1)), share if axis == 2 else share[:, None])
    for axis, place in zip((2, 1), along, strict=True):
        beyond = (place < 0) | (place > 1)
        if bool(beyond.any()):
            out = out.masked_fill(beyond if axis == 2 else beyond[:, None], -1e4)
    return out


def detect(pipeline: Any, image: Any, labels: Sequence[str] | None, threshold: float, top: int) -> list[Detection]:
    """Boxes of a system that finds things by itself: `system.classes` names them; `labels` keeps only some."""
    names: list[str] = list(getattr(pipeline.system, "classes", ()))
    if labels and (unknown := [n for n in labels if n not in names]):
        raise UserError(f"{pipeline.id or 'this system'} knows no {unknown[0]!r}", f"it finds {', '.join(names) or 'things without names'}")
    picture = decode(image)
    frame = window(picture.size, pipeline._image_plan())
    with torch.inference_mode(), autocast("auto", pipeline.device)(True):
        boxes, kind, score = (v[0].cpu() for v in pipeline.system.detect(pipeline.read_images([picture])))
    low, extent = torch.tensor(frame[:2]).repeat(2), torch.tensor([frame[2] - frame[0], frame[3] - frame[1]]).repeat(2)
    boxes = (boxes.float() * extent + low).clamp(0, 1)
    out = [Detection(names[k] if k < len(names) else f"class {k}", float(s), (float(b[0]), float(b[1]), float(b[2]), float(b[3])))
           for b, k, s in zip(boxes, kind.tolist(), score, strict=True) if k >= 0 and s >= threshold]
    return [d for d in out if not labels or d.label in labels][:top]


def keypoints(pipeline: Any, image: Any, found: Sequence[Detection]) -> list[Detection]:
    """See `Pipeline.keypoints`."""
    pipeline._need("keypoints")
    if not found:
        return []
    picture = decode(image)
    frame = window(picture.size, pipeline._image_plan())
    corners = [[*inside(frame, d.box[:2]), *inside(frame, d.box[2:])] for d in found]
    with torch.inference_mode(), autocast("auto", pipeline.device)(True):
        marked = pipeline.system.keypoints(pipeline.read_images([picture]), torch.tensor([corners], device=pipeline.device))[0].float().cpu()
    low, extent = torch.tensor(frame[:2]), torch.tensor([frame[2] - frame[0], frame[3] - frame[1]])
    places, shown = (marked[..., :2] * extent + low).clamp(0, 1), marked[..., 2] > 0
    return [replace(d, points=tuple((float(x), float(y)) if there else None for (x, y), there in zip(xy, seen, strict=True)))
            for d, xy, seen in zip(found, places.tolist(), shown.tolist(), strict=True)]


def boxed(image: Image.Image, found: Sequence[Detection]) -> Image.Image:
    """The picture with its detections drawn, one colour a label, and their key points where they have some."""
    drawn, names = image.convert("RGB"), list(dict.fromkeys(d.label for d in found))
    pen, (w, h) = ImageDraw.Draw(drawn), drawn.size
    for d in reversed(found):
        colour, box = COLOURS[names.index(d.label) % len(COLOURS)], [v * s for v, s in zip(d.box, (w, h, w, h), strict=True)]
        pen.rectangle(tuple(box), outline=colour, width=max(1, min(w, h) // 150))
        r = max(1, min(w, h) // 100)
        for x, y in (p for p in d.points if p is not None):
            pen.ellipse((x * w - r, y * h - r, x * w + r, y * h + r), fill=colour, outline="white")
        text = f"{d.label} {d.score:.2f}"
        left, top, right, bottom = pen.textbbox((box[0], max(0, box[1] - 11)), text)
        pen.rectangle((left, top, right, bottom), fill=colour)
        pen.text((box[0], max(0, box[1] - 11)), text, fill=(0, 0, 0))
    return drawn
