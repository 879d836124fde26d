"""Few-shot transfer: ridge regression from frozen features to one-hot targets, in closed form (the few-shot probe of Kolesnikov et al. 2020
and Zhai et al. 2022), repeated over several draws of the training pictures."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.tasks.encode import Progress, class_names, encode_all_images, name_of
from polysense.tasks.result import Metric, Result, mean_of, metric, mid_rank

STRENGTHS = tuple(10.0 ** e for e in range(-4, 3))


def run(subject: Any, test: Any, train: Any, *, shots: Sequence[int] | int = (1, 5, 10), draws: int = 5, l2: float | None = None, seed: int = 0,
        batch_size: int = 64, progress: Progress | None = None) -> Result:
    """Accuracy from `shots` training pictures a class, mean over `draws` of them; the most shots come first.

    `l2`: strength of the ridge (None: of STRENGTHS, the one of least leave-one-out squared error on the drawn pictures).
    """
    learn = encode_all_images(subject, train, progress, batch_size=batch_size)
    asked = encode_all_images(subject, test, progress, batch_size=batch_size)
    names, (x, y), (features, label) = class_names(asked, learn), learn.labelled(), asked.labelled()
    counts = sorted({shots} if isinstance(shots, int) else set(shots), reverse=True)
    if not counts or counts[-1] < 1 or draws < 1:
        raise UserError(f"shots={shots}, draws={draws} leaves nothing to learn from", "both are at least 1")
    metrics: dict[str, Metric] = {}
    for count in counts:
        right = np.zeros(len(label))
        for draw in range(draws):
            rows = torch.from_numpy(some_of_each(y, count, np.random.default_rng([seed, count, draw])))
            scores = ridge_scores(x[rows], F.one_hot(torch.from_numpy(y)[rows], len(names)), features, l2)
            right += mid_rank(scores, scores[np.arange(len(label)), label]) <= 1
        metrics[f"accuracy_{count}_shot"] = metric(mean_of(right / draws), len(label), chance=1 / len(names), seed=seed)
    notes = {**asked.notes(), "draws": draws, "fewest_in_a_class": int(np.bincount(y, minlength=len(names)).min())}
    return Result("few_shot", name_of(subject), asked.name, len(label), metrics, notes=notes)


def some_of_each(y: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `count` random samples of each class (of all, where a class has fewer)."""
    order = rng.permutation(len(y))
    by_class = order[np.argsort(y[order], kind="stable")]
    sizes = np.bincount(y)
    return by_class[np.arange(len(y)) - (np.cumsum(sizes) - sizes)[y[by_class]] < count]


def ridge(x: Tensor, y: Tensor, l2: float) -> Tensor:
    """`(X^T X + l2 I)^-1 X^T Y` [D,C] in float64, for x [n,D], y [n,C], l2 > 0; with n < D through the equal `X^T (X X^T + l2 I)^-1 Y`."""
    x, y = x.double(), y.double()
    n, d = x.shape
    if n < d:
        return x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(n, dtype=x.dtype), y)
    return torch.linalg.solve(x.T @ x + l2 * torch.eye(d, dtype=x.dtype), x.T @ y)


def ridge_scores(x: Tensor, y: Tensor, features: Tensor, l2: float | None = None) -> np.ndarray:
    """Scores [m,C] of features [m,D] by the ridge of y [n,C] on x [n,D]. Both are centred first: a bias that is not penalised."""
    x, y, features = x.double(), y.double(), features.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    strength = leave_one_out(x - x_mean, y - y_mean) if l2 is None else l2
    return ((features - x_mean) @ ridge(x - x_mean, y - y_mean, strength) + y_mean).numpy()


def leave_one_out(x: Tensor, y: Tensor, strengths: Sequence[float] = STRENGTHS) -> float:
    """The strength of least leave-one-out squared error, from one decomposition: the error without row i is `(y - Hy)_i / (1 - H_ii)`,
    where H of centred data counts the mean as 1/n (Golub, Heath & Wahba 1979)."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    errors: list[float] = []
    for l2 in strengths:
        shrink = s.square() / (s.square() + l2)
        left = y - (u * shrink) @ (u.T @ y)
        errors.append(float((left / (1 - (u.square() * shrink).sum(1) - 1 / len(x)).clamp(min=1e-9)[:, None]).square().sum()))
    return strengths[int(np.argmin(errors))]
