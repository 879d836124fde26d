"""Attentive probe (Chen et al. 2022, CAE, section 4.2): a learned query looks at the frozen patches of a picture, a linear layer names the class.

Masked models keep what a picture shows in their patches, not in one pooled vector; this probe says what is there. Weight decay is chosen on a
validation part of the training data, then all of it is learned from again; the test data are looked at once, at the end.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.nn.attentive import AttentivePool
from polysense.tasks.encode import Progress, class_names, encode_all_images, name_of, tower_of
from polysense.tasks.linear_probe import held_out
from polysense.tasks.result import Result, classification

DECAYS = (1e-3, 1e-1)


def run(subject: Any, test: Any, train: Any, *, decays: Sequence[float] = DECAYS, steps: int = 200, lr: float = 1e-3, heads: int = 0,
        validation: float = 0.2, seed: int = 0, batch_size: int = 64, progress: Progress | None = None) -> Result:
    """`decays`: weight decays tried. `steps` of at most 256 pictures at `lr`. `heads`: 0 for the most of 12, 8, 6, 4, 3, 2 that divide the width."""
    look = places_of(subject.system)
    learn = encode_all_images(subject, train, progress, batch_size=batch_size, encode=look)
    asked = encode_all_images(subject, test, progress, batch_size=batch_size, encode=look)
    if learn.features.ndim != 3 or asked.features.ndim != 3:
        raise UserError("the attentive probe reads patches, and was given one vector a picture", "give the data themselves, not pooled features")
    names, (x, y), (tokens, label) = class_names(asked, learn), learn.labelled(), asked.labelled()
    kept = held_out(y, validation, seed)
    if not kept.any() or kept.all() or not decays:
        raise UserError(f"{len(y)} training samples cannot spare a validation part", "give more samples")
    hold, target = torch.from_numpy(kept), torch.from_numpy(y)
    heads = heads or next(n for n in (12, 8, 6, 4, 3, 2, 1) if x.shape[-1] % n == 0)

    def fitted(rows: Tensor, truth: Tensor, decay: float) -> nn.Module:
        return fit(rows, truth, len(names), heads, decay, steps, lr, seed)

    tried = {d: float((scores(fitted(x[~hold], target[~hold], d), x[hold]).argmax(1) == y[kept]).mean()) for d in decays} if len(decays) > 1 else {}
    best = max(tried, key=lambda d: tried[d]) if tried else decays[0]
    said = scores(fitted(x, target, best), tokens)
    notes = {**asked.notes(), "weight_decay": best, "validation_accuracy": {f"{k:g}": round(v, 4) for k, v in tried.items()}, "heads": heads,
             "tokens": x.shape[1], "train_samples": len(y)}
    return classification("attentive_probe", name_of(subject), asked.name, said, label, names, seed=seed, notes=notes)


def places_of(system: Any) -> Any:
    """image [B,3,H,W] -> [B,N,D], the features of the places of the tower that `encode_image` reads. UserError for a system without such a tower."""
    tower = tower_of(system, "dense")
    if tower is not None:
        return lambda image: tower.dense(image).flatten(1, 2)
    raise UserError(f"{type(system).__name__} has no image tower whose places can be read", "take linear_probe or knn_probe instead")


def fit(x: Tensor, y: Tensor, classes: int, heads: int, decay: float, steps: int, lr: float, seed: int) -> nn.Module:
    """The pool, a batch norm without parameters and a linear layer, by AdamW on a cosine. x [n,N,D], y [n]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = AttentivePool.Config(width=x.shape[-1], heads=heads).build()
        model = nn.Sequential(pool, nn.BatchNorm1d(x.shape[-1], affine=False), nn.Linear(x.shape[-1], classes))
        flat = [p for n, p in model.named_parameters() if p.ndim < 2]
        deep = [p for n, p in model.named_parameters() if p.ndim >= 2]
        optimizer = torch.optim.AdamW([{"params": deep, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}], lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        lot, n = torch.Generator().manual_seed(seed), min(256, len(x))
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(steps):
                rows = torch.randperm(len(x), generator=lot)[:n]
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def scores(model: nn.Module, x: Tensor) -> np.ndarray:
    """Logits [n,C] of tokens [n,N,D]."""
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(256)]).numpy()
