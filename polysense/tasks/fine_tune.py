"""Fine-tuning (He et al. 2022, MAE, appendix A.1): in a copy, every weight that `encode_image` reads learns the labels with a dense layer behind it.

What a probe cannot say: how good a start the weights are. Rates fall along the depth (`groups`); labels are smoothed, half of the pictures
mirrored; a batch norm without parameters and a dense layer read what `encode_image` says. The rate is chosen on a part of the training data where
several are given; the test data are looked at once, at the end. Pictures are read when their batch comes, never all at once. A longer tuning with
mixed pictures and augmentation is the system `probes`, whose checkpoints stay.
"""
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import chain
from math import cos, pi
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.depth import layers, undecayed
from polysense.base.errors import UserError
from polysense.data.sources import BadSample
from polysense.tasks.encode import Features, Progress, frozen, name_of, sample_of
from polysense.tasks.result import Result, classification

Rows = Sequence[int] | np.ndarray


def run(subject: Any, test: Any, train: Any, *, rates: Sequence[float] = (1e-3,), steps: int = 100, decay: float = 0.75, weight_decay: float = 0.05,
        smoothing: float = 0.1, validation: float = 0.2, seed: int = 0, batch_size: int = 64, progress: Progress | None = None) -> Result:
    """`rates`: learning rates tried, each by a tuning of its own. `decay`: of the rate from layer to layer. `validation`: share of the training data
    that judges the rates, where there are several."""
    if isinstance(test, Features) or isinstance(train, Features):
        raise UserError("fine-tuning reads pictures, and was given features", "give the data themselves")
    if test.classes and train.classes and tuple(test.classes) != tuple(train.classes):
        raise UserError(f"{test.name!r} and {train.name!r} have different classes", "use splits of the same data")
    if not rates or steps < 1:
        raise UserError("fine-tuning needs a rate and at least one step", "such as rates=[0.001] steps=100")
    names = tuple(train.classes) or tuple(test.classes) or numbered(train, test)
    order, said = np.random.default_rng(seed).permutation(len(train)), dict[float, float]()

    def tuned(rows: Rows, rate: float) -> "Tuned":
        return fit(subject, train, rows, len(names), rate, steps, decay, weight_decay, smoothing, seed, batch_size, progress)

    if len(rates) > 1:
        kept, rest = np.split(order, [max(1, round(validation * len(order)))])
        if not len(rest):
            raise UserError(f"{len(order)} training samples cannot spare a validation part", "give more samples, or one rate")
        for rate in rates:
            logits, label, _ = answers(tuned(rest, rate), subject, train, kept, batch_size)
            said[rate] = float((logits.argmax(1) == label).mean())
    best = max(said, key=lambda r: said[r]) if said else rates[0]
    scores, label, skipped = answers(tuned(order, best), subject, test, range(len(test)), batch_size)
    notes = {**({"skipped": skipped} if skipped else {}), "rate": best, "validation_accuracy": {f"{k:g}": round(v, 4) for k, v in said.items()},
             "steps": steps, "train_samples": len(order)}
    return classification("fine_tune", name_of(subject), test.name, scores, label, names, seed=seed, notes=notes)


def numbered(*sources: Any) -> tuple[str, ...]:
    """The numbers of classes that have no names."""
    return tuple(str(c) for c in range(1 + max((label for s in sources for label in s.labels()), default=-1)))


class Tuned(nn.Module):
    """A copy of a system, in which teachers learn like all else, and a dense layer on what its `encode_image` says: [B,3,H,W] -> [B,C]."""

    def __init__(self, system: Any, width: int, classes: int):
        super().__init__()
        self.system = deepcopy(system)
        for module in list(self.system.modules()):
            if hasattr(module, "thaw"):
                module.thaw()
        self.system.requires_grad_(True)
        self.norm, self.head = nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.system.encode_image(image)))


def fit(subject: Any, train: Any, rows: Rows, classes: int, rate: float, steps: int, decay: float, weight_decay: float, smoothing: float, seed: int,
        batch_size: int, progress: Progress | None = None) -> Tuned:
    """AdamW, a tenth of the steps of warm-up, then a cosine; gradients no longer than one. UserError where `encode_image` passes no gradient."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        fed = endless(subject, train, rows, batch_size, seed)
        first = next(fed)
        with frozen(subject.system):
            width = subject.system.encode_image(first[0][:1]).shape[-1]
        model = Tuned(subject.system, width, classes).to(first[0].device).train()
        optimizer = torch.optim.AdamW(groups(model, rate, decay, weight_decay))
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
            (i + 1) / warm, 0.5 * (1 + cos(pi * max(0, i - warm) / max(1, steps - warm)))))
        for step, (image, label) in zip(range(steps), chain([first], fed)):
            loss = F.cross_entropy(model(image), label, label_smoothing=smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not step and all(p.grad is None for p in model.system.parameters()):
                raise UserError(f"encode_image of {type(subject.system).__name__} passes no gradient on", "take linear_probe or knn_probe instead")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress:
                progress(step + 1, steps)
        return model.eval()


def groups(model: Tuned, rate: float, decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """One group for each layer and kind, as MAE's released code has them: the head and the last norm at `rate`, block l of L at rate
    decay^(L + 1 - l), the patches at rate decay^(L + 1), and so what no tower holds."""
    plain, inside = undecayed(model.system), [n for n, _ in model.system.named_parameters()]
    depth = layers(inside)
    most = max((top for _, top in depth.values()), default=0)
    out: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, p in model.system.named_parameters():
        layer, top = depth[name]
        below = top - layer if top else most
        group = out.setdefault((below, name in plain), {
            "params": [], "lr": rate * decay ** below, "weight_decay": 0.0 if name in plain else weight_decay})
        group["params"].append(p)
    return [*out.values(), {"params": [model.head.weight], "lr": rate, "weight_decay": weight_decay},
            {"params": [model.head.bias], "lr": rate, "weight_decay": 0.0}]


def endless(subject: Any, source: Any, rows: Rows, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of at least two pictures, half of them mirrored. UserError where a whole pass gives none."""
    lot, wanted = np.random.default_rng(seed), max(2, min(size, len(rows)))
    while True:
        order, found = lot.permutation(np.asarray(rows)), 0
        for some in (order[i:i + wanted] for i in range(0, len(order) - wanted + 1, wanted)):
            image, label, _ = read(subject, source, some)
            turned = torch.from_numpy(lot.random(len(label)) < 0.5)
            if len(label) < 2:               # a batch norm needs two
                continue
            found += 1
            yield torch.where(turned[:, None, None, None].to(image.device), image.flip(-1), image), torch.from_numpy(label).to(image.device)
        if not found:
            raise UserError(f"{source.name!r} gives no two pictures with labels to learn from", "give more samples")


def read(subject: Any, source: Any, rows: Rows) -> tuple[Tensor, np.ndarray, list[list[str]]]:
    """(pictures [b,3,H,W] as the subject reads them, labels [b], [id, reason] of what cannot be read); without those that have no label."""
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: sample_of(source, int(i)), rows))
    fine = [s for s in got if not isinstance(s, BadSample) and int(s.get("label", -1)) >= 0]
    image = subject.read_images([s["image"] for s in fine]) if fine else torch.empty(0, 3, 1, 1)
    return image, np.array([int(s["label"]) for s in fine], np.int64), [[s.id, s.reason] for s in got if isinstance(s, BadSample)]


@torch.inference_mode()
def answers(model: Tuned, subject: Any, source: Any, rows: Rows, size: int) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """(logits [n,C], labels [n], what was skipped)."""
    scores, labels, skipped = [np.empty((0, model.head.out_features), np.float32)], [np.empty(0, np.int64)], list[list[str]]()
    for start in range(0, len(rows), size):
        image, label, bad = read(subject, source, rows[start:start + size])
        skipped += bad
        if len(label):
            scores.append(model(image).float().cpu().numpy())
            labels.append(label)
    if len(scores) == 1:
        raise UserError(f"no picture of {source.name!r} can be read", skipped[0][1] if skipped else "none has a label")
    said = np.concatenate(scores)
    if not np.isfinite(said).all():
        raise UserError("fine-tuning diverged: its answers are not finite", "take a lower rate, such as rates=[0.0003]")
    return said, np.concatenate(labels), skipped
