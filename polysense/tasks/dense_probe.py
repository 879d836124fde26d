"""Linear probe of places: a dense layer on the frozen features of every patch says which thing it shows, or that it shows none.

Masked models know more of their patches than of the whole; this says how much of it a linear layer finds. A patch belongs to the thing that covers
half of it or more. A patch has no file of its own, so data need masks with classes (`mask`, `box_label`).
"""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.loader import Loader
from polysense.tasks.encode import finite, frozen
from polysense.tasks.linear_probe import logistic
from polysense.tasks.result import Metric, mean_of, metric

NEEDS = ("image", "mask", "box_label")


def dense(subject: Any, test: Any, train: Any, look: Callable[[Tensor], Tensor], *, strength: float = 10.0, most: int = 3000, seed: int = 0,
          batch_size: int = 64) -> Metric:
    """Share of the patches on things that get their class, among all classes and "no thing", mean over pictures. Learned from `most` random patches,
    half of them on things, by logistic regression of C = `strength`."""
    classes = len(train.classes)
    (x, y), (asked, truth) = (places(subject, s, look, classes, batch_size) for s in (train, test))
    x, y, lot = x.flatten(0, 1), y.flatten(), np.random.default_rng(seed)
    rows = np.concatenate([lot.permutation(np.flatnonzero(side))[:most // 2] for side in (y.numpy() < classes, y.numpy() == classes)])
    weight, bias = logistic(x[rows], y[rows].numpy(), classes + 1, strength, steps=200, tolerance=1e-4)
    right, on = (asked.double() @ weight.T + bias).argmax(-1) == truth, truth < classes
    there = on.any(1)
    if not there.any():
        raise UserError(f"no patch of {test.name!r} is covered by a thing", "use data with larger things")
    value = ((right & on).sum(1) / on.sum(1).clamp(min=1))[there].double().numpy()
    return metric(mean_of(value), len(value), chance=1 / (classes + 1), seed=seed)


def places(subject: Any, source: Any, look: Callable[[Tensor], Tensor], classes: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Unit features [n,N,D] of all places of all pictures, and the class [n,N] that covers each, `classes` where none does."""
    rows, truth = list[Tensor](), list[Tensor]()
    with frozen(subject.system):
        for batch in Loader(source, subject.preset.feed, None, batch_size=batch_size, train=False, needs=NEEDS):
            said = finite(look(batch["image"].to(subject.device)), "the tower")
            side = round(said.shape[1] ** 0.5)
            if side * side != said.shape[1]:
                raise UserError(f"{said.shape[1]} places do not form a square", "this probe reads square pictures")
            cover, thing = F.adaptive_avg_pool2d(batch["mask"].float(), side).flatten(2).max(1)
            rows.append(said)
            truth.append(torch.where(cover >= 0.5, batch["box_label"].gather(1, thing), classes))
    return torch.cat(rows), torch.cat(truth)
