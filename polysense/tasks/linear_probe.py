"""Linear probe as in CLIP (Radford et al. 2021, appendix A.3): L2-regularised multinomial logistic regression on frozen features by
L-BFGS, the strength C swept in log steps on a validation part of the training data, then fitted again on all of them. The test data are
looked at once, at the end."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.tasks.encode import Progress, class_names, encode_all_images, name_of, reader
from polysense.tasks.result import Result, classification

SWEEP = tuple(10.0 ** e for e in range(-2, 7))


def run(subject: Any, test: Any, train: Any, *, sweep: Sequence[float] = SWEEP, validation: float = 0.2, seed: int = 0,
        tokens: str = "pooled", batch_size: int = 64, progress: Progress | None = None) -> Result:
    """`sweep`: values of C tried, rising until two in a row are worse by more than a standard error; two more, half a step to either side of the
    best, follow.

    `validation`: share of the training data. `tokens`: which features, see `encode.reader`."""
    look = reader(subject.system, tokens) if tokens != "pooled" else None
    learn, asked = (encode_all_images(subject, s, progress, batch_size=batch_size, encode=look) for s in (train, test))
    names, (x, y) = class_names(asked, learn), learn.labelled()
    c, tried = choose(x, y, len(names), sweep, validation, seed)
    weight, bias = logistic(x, y, len(names), c)
    features, label = asked.labelled()
    scores = (features.double() @ weight.T + bias).numpy()
    notes = {**asked.notes(), "tokens": tokens, "C": c, "validation_accuracy": {f"{k:.3g}": round(v, 4) for k, v in sorted(tried.items())},
             "train_samples": len(y)}
    return classification("linear_probe", name_of(subject), asked.name, scores, label, names, seed=seed, notes=notes)


def choose(x: Tensor, y: np.ndarray, classes: int, sweep: Sequence[float] = SWEEP, validation: float = 0.2,
           seed: int = 0) -> tuple[float, dict[float, float]]:
    """The C of the best validation accuracy, and all that were tried. Equal accuracies: the middle of them, in log C."""
    kept = held_out(y, validation, seed)
    if not kept.any() or kept.all() or not sweep:
        raise UserError(f"{len(y)} training samples cannot spare a validation part", "give more samples")
    hold = torch.from_numpy(kept)
    tried: dict[float, float] = {}
    start: tuple[Tensor, Tensor] | None = None

    def score(c: float) -> None:
        nonlocal start
        # Along the path each starts from its neighbour; ranking the strengths does not need the last digits of each optimum.
        start = logistic(x[~hold], y[~kept], classes, c, start, steps=200, tolerance=1e-5)
        guess = (x[hold].double() @ start[0].T + start[1]).argmax(1).numpy()
        tried[c] = float((guess == y[kept]).mean())

    def best() -> float:
        top = sorted(c for c, v in tried.items() if v == max(tried.values()))
        return top[(len(top) - 1) // 2]

    for c in sorted(sweep):
        score(float(c))
        top = max(tried.values())
        if len(tried) > 3 and max(list(tried.values())[-2:]) < top - (top * (1 - top) / kept.sum()) ** 0.5:
            break                            # two weaker penalties in a row were worse, by more than the draw: those behind overfit more
    for c in (best() * 10 ** -0.5, best() * 10 ** 0.5):
        score(c)
    return best(), tried


def held_out(y: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Mask [n] of about `share` of every class; a class with a single sample stays in training."""
    order = np.random.default_rng(seed).permutation(len(y))
    by_class = order[np.argsort(y[order], kind="stable")]            # classes one after the other, shuffled inside
    count = np.bincount(y)
    place = np.arange(len(y)) - (np.cumsum(count) - count)[y[by_class]]
    take = np.minimum(np.maximum(1, np.round(share * count)), count - 1)
    out = np.zeros(len(y), bool)
    out[by_class] = place < take[y[by_class]]
    return out


def logistic(x: Tensor, y: np.ndarray, classes: int, c: float, start: tuple[Tensor, Tensor] | None = None, *,
             steps: int = 1000, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Minimises `C * sum_i CE(W x_i + b, y_i) + |W|^2 / 2` in float64 (the form of scikit-learn): W [classes,D], b [classes].

    x [n,D]. Stops where no entry of the gradient of the objective / (C n) exceeds `tolerance`, at most after `steps` iterations. The
    bias is not penalised, so features may be centred for speed without moving the optimum; its free constant is fixed by a mean of zero.
    """
    target, n = torch.from_numpy(y), len(y)
    middle = x.double().mean(0)
    x = x.double() - middle
    weight, bias = (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)) if start is None else (start[0].clone(), start[1] + start[0] @ middle)
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, max_eval=2 * steps, tolerance_grad=tolerance, tolerance_change=1e-13,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, target) + weight.square().sum() / (2 * c * n)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        bias = bias - weight @ middle
        return weight.detach(), bias - bias.mean()
