"""What an exam returns: numbers with their uncertainty, as a table and as JSON."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

DRAWS = 2000
Statistic = Callable[[np.ndarray], np.ndarray]           # weights of the samples [draws, n] -> value of each draw [draws]


class Metric(NamedTuple):
    """A value, its 95 % bootstrap interval, and what guessing would give (None where that means nothing)."""
    value: float
    low: float
    high: float
    chance: float | None = None


class Units(NamedTuple):
    """The chief metric taken apart by independent unit (a picture with all its captions): the mean over P parts of sum(total) / sum(size).
    What paired comparisons draw from. Both [P,n]."""
    total: np.ndarray
    size: np.ndarray

    def value(self, weights: np.ndarray) -> np.ndarray:
        """weights [draws,n] of the units -> the metric of each draw [draws]."""
        return np.mean([(weights @ t) / (weights @ s).clip(1e-12) for t, s in zip(self.total, self.size, strict=True)], 0)


@dataclass(frozen=True)
class Result:
    """`metrics` by name, the chief one first; `n` samples were examined; `classes` maps a class to (its accuracy, its samples)."""
    exam: str
    subject: str
    data: str
    n: int
    metrics: dict[str, Metric]
    classes: dict[str, tuple[float, int]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)  # choices made on the way and samples left out
    units: Units | None = field(default=None, repr=False, compare=False)     # of the chief metric; not part of `to_dict`

    @property
    def value(self) -> float:
        """The chief metric."""
        return next(iter(self.metrics.values())).value

    @property
    def chance(self) -> float | None:
        """What guessing gives in the chief metric."""
        return next(iter(self.metrics.values())).chance

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(metric, value, interval, chance) as text."""
        show = lambda x: "" if x is None else f"{x:.4g}"
        return [(k, show(m.value), f"{show(m.low)} to {show(m.high)}", show(m.chance)) for k, m in self.metrics.items()]

    def table(self) -> Table:
        """For rich to print."""
        from rich.table import Table

        out = Table(title=f"{self.exam}: {self.subject} on {self.data} (n = {self.n})", title_justify="left")
        for head in ("metric", "value", "95 % interval", "chance"):
            out.add_column(head, justify="left" if head == "metric" else "right")
        for row in self.rows():
            out.add_row(*row)
        return out

    def to_dict(self) -> dict[str, Any]:
        said = {k: v for k, v in asdict(replace(self, units=None)).items() if k != "units"}
        return {**said, "metrics": {k: m._asdict() for k, m in self.metrics.items()}, "chance": self.chance}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)


def bootstrap(statistic: Statistic, n: int, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """Percentile 95 % interval (Efron 1979) of a statistic of n independent units, given as a function of their weights."""
    rng, out = np.random.default_rng(seed), []
    step = max(1, 4_000_000 // n)                        # bounds the memory of one block of resamples
    for start in range(0, draws, step):
        k = min(step, draws - start)
        drawn = rng.integers(n, size=(k, n)) + np.arange(k)[:, None] * n
        out.append(statistic(np.bincount(drawn.ravel(), minlength=k * n).reshape(k, n).astype(np.float64)))
    low, high = np.nanpercentile(np.concatenate(out), [2.5, 97.5])
    return float(low), float(high)


class Gap(NamedTuple):
    """A difference with its 95 % interval and the two-sided bootstrap probability of one at least as far from none."""
    value: float
    low: float
    high: float
    p: float


def paired(one: Sequence[Units], two: Sequence[Units] | None = None, *, seed: int = 0, draws: int = DRAWS) -> Gap:
    """Mean over training seeds of a metric, or of its difference between two systems examined on the same units (Efron & Tibshirani 1993,
    chapter 8). one, two: the units of each seed.

    Every draw takes units, the same ones for both systems, and then training seeds, in pairs: the interval holds both kinds of chance. p is
    meaningful for differences only.
    """
    n, seeds, rng = one[0].total.shape[1], len(one), np.random.default_rng(seed)
    if any(u.total.shape[1] != n for u in (*one, *(two or ()))) or (two is not None and len(two) != seeds):
        raise ValueError("only systems examined on the same units, with as many seeds, can be compared in pairs")

    def values(weights: np.ndarray) -> np.ndarray:
        mine = np.stack([u.value(weights) for u in one])
        return mine if two is None else mine - np.stack([u.value(weights) for u in two])

    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    drawn = np.take_along_axis(values(weights).T, rng.integers(seeds, size=(draws, seeds)), 1).mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + draws))
    return Gap(float(values(np.ones((1, n))).mean()), float(low), float(high), float(p))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for how many there are (Holm 1979)."""
    out, worst = [0.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - k) * p[i]))
        out[i] = worst
    return out


def metric(statistic: Statistic, n: int, *, chance: float | None = None, seed: int = 0) -> Metric:
    """A statistic with its interval."""
    return Metric(float(statistic(np.ones((1, n)))[0]), *bootstrap(statistic, n, seed=seed), chance)


def mean_of(outcome: np.ndarray) -> Statistic:
    """Mean of one outcome per unit. outcome [n]."""
    return lambda w: w @ outcome / w.sum(1)


def grouped_mean_of(outcome: np.ndarray, group: np.ndarray, groups: int) -> Statistic:
    """Mean over all outcomes [m] where whole groups are drawn: captions of one picture are not independent."""
    total, count = np.bincount(group, outcome, groups), np.bincount(group, minlength=groups)
    return lambda w: w @ total / (w @ count).clip(1e-12)


def grouped_median_of(value: np.ndarray, group: np.ndarray) -> Statistic:
    """(Lower) median of values [m] where whole groups are drawn."""
    order = np.argsort(value, kind="stable")
    value, group = value[order], group[order]

    def median(w: np.ndarray) -> np.ndarray:
        mass = w[:, group].cumsum(1)
        return value[(mass >= mass[:, -1:] / 2).argmax(1)]
    return median


def class_mean_of(correct: np.ndarray, label: np.ndarray, classes: int) -> Statistic:
    """Accuracy averaged over the classes that occur: every class counts the same."""
    hot = np.eye(classes)[label]

    def mean(w: np.ndarray) -> np.ndarray:
        count = w @ hot
        with np.errstate(invalid="ignore"):
            return np.nanmean(np.where(count > 0, w @ (hot * correct[:, None]) / count, np.nan), 1)
    return mean


def classification(exam: str, subject: str, data: str, scores: np.ndarray, label: np.ndarray, names: tuple[str, ...], *, seed: int = 0,
                   notes: Mapping[str, Any] | None = None) -> Result:
    """Accuracy, top-5 accuracy and class-averaged accuracy of scores [n,C] for labels [n]. Ties count half way (see `mid_rank`)."""
    n, classes = scores.shape
    rank = mid_rank(scores, scores[np.arange(n), label])
    correct = (rank <= 1).astype(float)
    metrics = {"accuracy": metric(mean_of(correct), n, chance=1 / classes, seed=seed)}
    if classes > 5:
        metrics["top5_accuracy"] = metric(mean_of((rank <= 5).astype(float)), n, chance=5 / classes, seed=seed)
    metrics["class_mean_accuracy"] = metric(class_mean_of(correct, label, classes), n, chance=1 / classes, seed=seed)
    each = {names[c]: (float(correct[label == c].mean()), int((label == c).sum())) for c in np.unique(label)}
    return Result(exam, subject, data, n, metrics, each, dict(notes or {}), Units(correct[None], np.ones((1, n))))


def mid_rank(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """1 + better + half of the equal others: a system that scores everything alike earns the middle, not the top.

    scores [n,m] with `own` [n] the score of the true entry, itself one of its row's.
    """
    return 1 + (scores > own[:, None]).sum(1) + ((scores == own[:, None]).sum(1) - 1) / 2
