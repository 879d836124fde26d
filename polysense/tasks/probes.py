"""One exam for any image encoder: neighbours, linear, few-shot and attentive probe, on features that are computed once, beside the same encoder
untrained. No score says as much alone: a probe of random weights is far above chance.

What each does is in knn_probe, linear_probe, few_shot, attentive_probe and, where the data have masks, dense_probe; strengths are chosen on parts of
the training data, and the test data are asked once by each. Tuning every weight is the exam `fine_tune`; the recipes of the papers at full size
(fine-tuning, the linear probes of MAE, the attentive one) are presets of the system `probes`.
"""
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.tasks import attentive_probe, dense_probe, few_shot, linear_probe
from polysense.tasks.encode import Features, Progress, class_names, encode_all_images, name_of, reader
from polysense.tasks.knn_probe import votes
from polysense.tasks.result import Metric, Result, mean_of, metric, mid_rank

NEIGHBOURS, TEMPERATURE = (20, 10, 100, 200), 0.07


def run(subject: Any, test: Any, train: Any, *, shots: Sequence[int] = (1, 5, 10), tokens: str = "pooled", steps: int = 200, seed: int = 0,
        batch_size: int = 64, progress: Progress | None = None) -> Result:
    """The linear probe's accuracy first. `notes` hold what was chosen on the way and how the features lie: their spread (1: all over the sphere),
    the dimensions that they fill, and the mean distance to the nearest neighbour. `steps`: of the attentive probe."""
    look = reader(subject.system, tokens) if tokens != "pooled" else None
    learn, asked = (encode_all_images(subject, s, progress, batch_size=batch_size, encode=look) for s in (train, test))
    straight = linear_probe.run(subject, asked, learn, seed=seed)
    out: dict[str, Metric] = {"linear": straight.metrics["accuracy"], **neighbours(asked, learn, seed)}
    notes: dict[str, Any] = {**straight.notes, "tokens": tokens, **diagnosis(asked.features)}
    out |= few_shot.run(subject, asked, learn, shots=shots, seed=seed).metrics
    try:
        places_of = attentive_probe.places_of(subject.system)
    except UserError as error:
        notes["no attentive probe"] = str(error)
    else:
        if not (isinstance(train, Features) or isinstance(test, Features)):
            places = [encode_all_images(subject, s, progress, batch_size=batch_size, encode=places_of) for s in (test, train)]
            attentive = attentive_probe.run(subject, places[0], places[1], steps=steps, seed=seed)
            out["attentive"] = attentive.metrics["accuracy"]
            notes["attentive weight_decay"] = attentive.notes["weight_decay"]
            if all(set(dense_probe.NEEDS) <= set(s.offers) for s in (test, train)) and getattr(subject, "preset", None) is not None:
                out["dense"] = dense_probe.dense(subject, test, train, places_of, seed=seed, batch_size=batch_size)
    if not (isinstance(train, Features) or isinstance(test, Features)) and getattr(subject, "preset", None) is not None:
        twin = untrained(subject, seed)
        look = reader(twin.system, tokens) if tokens != "pooled" else None
        born = [encode_all_images(twin, s, progress, batch_size=batch_size, encode=look) for s in (test, train)]
        out["untrained_linear"] = linear_probe.run(twin, born[0], born[1], seed=seed).metrics["accuracy"]
        out |= {f"untrained_{k}": v for k, v in neighbours(born[0], born[1], seed, NEIGHBOURS[:1]).items()}
    return Result("probes", name_of(subject), asked.name, straight.n, out, straight.classes, notes, straight.units)


def neighbours(asked: Features, learn: Features, seed: int, counts: Sequence[int] = NEIGHBOURS) -> dict[str, Metric]:
    """Accuracy of the vote of k neighbours, for each k that there are samples for."""
    names, (x, y), (features, label) = class_names(asked, learn), learn.labelled(), asked.labelled()
    out: dict[str, Metric] = {}
    for k in (k for i, k in enumerate(counts) if not i or k <= len(y)):
        said = votes(features, x, y, len(names), k, TEMPERATURE)
        right = (mid_rank(said, said[np.arange(len(label)), label]) <= 1).astype(float)
        out[f"knn_{k}"] = metric(mean_of(right), len(label), chance=1 / len(names), seed=seed)
    return out


def untrained(subject: Any, seed: int) -> Any:
    """The same subject with its system as it is born."""
    twin = copy(subject)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin.system = subject.preset.config.build().to(subject.device).eval()
    return twin


def diagnosis(features: Tensor) -> dict[str, float]:
    """How unit features [n,D] lie on the sphere (the first thousand of them)."""
    x = features[:1000].double()
    value = torch.linalg.svdvals(x - x.mean(0))
    share = value / value.sum().clamp_min(1e-12)
    near = torch.cdist(x, x).fill_diagonal_(torch.inf).min(1).values.mean() if len(x) > 1 else x.new_zeros(())
    found = {"feature_spread": x.std(0, correction=0).mean() * x.shape[1] ** 0.5,
             "effective_rank": torch.exp(-torch.special.xlogy(share, share).sum()), "nearest_distance": near}
    return {k: round(float(v), 4) for k, v in found.items()}
