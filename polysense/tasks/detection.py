"""Detection: average precision of boxes with classes, at an overlap of 0.5 (Everingham et al. 2010), over all classes that occur.

Within a class detections of all pictures are taken from the most certain on; each takes the unclaimed true box that it overlaps most, if by
0.5 or more, else it is wrong. Precision is made monotone and averaged over 101 levels of recall (Lin et al. 2014, COCO).
"""
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.loader import Loader
from polysense.tasks.encode import Progress, frozen, name_of
from polysense.tasks.result import Metric, Result

LEVELS = np.linspace(0, 1, 101)


def run(subject: Any, test: Any, *, overlap: float = 0.5, seed: int = 0, batch_size: int = 32, progress: Progress | None = None) -> Result:
    """AP and the recall of all that was found; `overlap`: least IoU of a hit."""
    if not 0 < overlap <= 1:
        raise UserError(f"overlap={overlap}", "give an IoU above 0 and at most 1")
    loader = Loader(test, subject.preset.feed, None, batch_size=batch_size, train=False, needs=("image", "boxes", "box_label"))
    rows, truth, done = [], [], 0                        # (class, score, hit, picture) of detections, (class, picture) of true boxes
    with frozen(subject.system):
        for batch in loader:
            found = [v.cpu() for v in subject.system.detect(batch["image"].to(subject.device))]
            for i in range(len(batch["boxes"])):
                kind, real = batch["box_label"][i], batch["box_label"][i] >= 0
                rows.append(hits(found[0][i], found[1][i], found[2][i], batch["boxes"][i][real], kind[real], overlap, done + i))
                truth.append(np.stack([kind[real].numpy(), np.full(int(real.sum()), done + i)], 1))
            done += len(batch["boxes"])
            if progress:
                progress(done, len(test))
    all_rows, all_truth = np.concatenate(rows), np.concatenate(truth)
    if not len(all_truth):
        raise UserError(f"no picture of {test.name!r} has a box", "use data with boxes, such as scenes")
    metrics = {"ap50" if overlap == 0.5 else "ap": drawn(all_rows, all_truth, done, seed, "ap"),
               "recall": drawn(all_rows, all_truth, done, seed, "recall")}
    notes = {"boxes": len(all_truth)} | ({"skipped": [list(s) for s in loader.skipped]} if loader.skipped else {})
    return Result("detection", name_of(subject), test.name, done, metrics, notes=notes)


def hits(boxes: Tensor, kind: Tensor, score: Tensor, true: Tensor, true_kind: Tensor, overlap: float, picture: int) -> np.ndarray:
    """Detections boxes [N,4], kind and score [N], most certain first, against true boxes [M,4] -> rows of (class, score, hit, picture)."""
    order = score.argsort(descending=True, stable=True)
    order = order[kind[order] >= 0]
    free, out = np.ones(len(true), bool), []
    shared = iou(boxes[order], true).numpy() * (kind[order][:, None] == true_kind[None]).numpy()
    for i, row in zip(order.tolist(), shared, strict=True):          # each depends on what the ones before it claimed
        best = int((row * free).argmax()) if len(true) else 0
        hit = bool(len(true)) and row[best] * free[best] >= overlap
        if hit:
            free[best] = False
        out.append((float(kind[i]), float(score[i]), float(hit), float(picture)))
    return np.array(out).reshape(-1, 4)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Boxes [N,4] and [M,4] (x0 y0 x1 y1) -> [N,M]."""
    low, high = torch.maximum(one[:, None, :2], other[None, :, :2]), torch.minimum(one[:, None, 2:], other[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    area = lambda b: (b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1)
    return both / (area(one)[:, None] + area(other)[None] - both).clamp(min=1e-9)


def precision(rows: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> float:
    """Mean over the classes that occur; `weight` [pictures] counts each picture so often."""
    out = []
    for c in np.unique(truth[:, 0]):
        total = weight[truth[truth[:, 0] == c, 1]].sum()
        if not total:
            continue
        mine = rows[rows[:, 0] == c]
        mine = mine[np.argsort(-mine[:, 1], kind="stable")]
        w = weight[mine[:, 3].astype(int)]
        hit, seen = (mine[:, 2] * w).cumsum(), w.cumsum()
        level, pure = hit / total, hit / np.maximum(seen, 1e-9)
        pure = np.maximum.accumulate(pure[::-1])[::-1]
        at = np.searchsorted(level, LEVELS, side="left")
        out.append(float(np.where(at < len(pure), np.append(pure, 0.0)[np.minimum(at, len(pure))], 0.0).mean()))
    return float(np.mean(out))


def drawn(rows: np.ndarray, truth: np.ndarray, pictures: int, seed: int, which: str) -> Metric:
    """The value with an interval over 200 draws of whole pictures (each costs a pass over all detections)."""
    def value(weight: np.ndarray) -> float:
        if which == "ap":
            return precision(rows, truth, weight)
        return float((rows[:, 2] * weight[rows[:, 3].astype(int)]).sum() / max(weight[truth[:, 1]].sum(), 1e-9))
    rng = np.random.default_rng(seed)
    draws = [value(np.bincount(rng.integers(pictures, size=pictures), minlength=pictures).astype(float)) for _ in range(200)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Metric(value(np.ones(pictures)), float(low), float(high), None)
