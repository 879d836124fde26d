"""Scaling laws: how the error of a system falls with compute, and what a larger run would reach.

    E = beta C^alpha,    C = GMACs of a sample x samples seen                        (Cherti et al. 2023, section 3)

`fit_law` fits it to the Pareto front of (compute, error) points by least squares of the logarithms, with a bootstrap interval, and predicts runs
that it was not shown; `gmacs` counts the products of one pass; `scan_rate` finds the learning rate of a size by short warm-ups; `seen` makes samples
the axis.
"""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp, isfinite
from typing import Any

import numpy as np
import torch

from polysense.base.errors import UserError
from polysense.base.plan import Preset
from polysense.train.fit import Diverged, fit
from polysense.train.run import seed_all

DRAWS = 2000


@dataclass(frozen=True)
class Point:
    """One run: its compute in GMACs, its error in (0, 1], and what it was."""
    compute: float
    error: float
    name: str = ""


@dataclass(frozen=True)
class Law:
    """E = beta C^alpha; `low` and `high` bound alpha in 95 % of the bootstrap draws; `front`: the points that it was fitted to."""
    alpha: float
    beta: float
    low: float
    high: float
    front: tuple[Point, ...]

    def predict(self, compute: float) -> float:
        """The error that the law expects of a run of so many GMACs."""
        return self.beta * compute ** self.alpha

    def miss(self, held: Point) -> float:
        """How far a run that was held out lies from its prediction, as a share of what it reached."""
        return abs(self.predict(held.compute) - held.error) / held.error


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats: less error than every point of no more compute, cheapest first."""
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.compute, p.error)):
        if not out or p.error < out[-1].error:
            out.append(p)
    return out


def fit_law(points: Sequence[Point], *, draws: int = DRAWS, seed: int = 0) -> Law:
    """The law of the Pareto front. UserError for errors or compute that have no logarithm, and for fewer than two points on the front."""
    if odd := [p for p in points if not (p.compute > 0 and p.error > 0 and isfinite(p.compute) and isfinite(p.error))]:
        raise UserError(f"{odd[0].name or 'a run'} has a compute of {odd[0].compute} and an error of {odd[0].error}", "both lie above 0")
    front = pareto(points)
    if len(front) < 2:
        raise UserError(f"{len(front)} of {len(points)} runs are on the front of error and compute", "a law takes two at least: train larger ones")
    x, y = np.log([p.compute for p in front]), np.log([p.error for p in front])
    alpha, shift = _line(x, y)
    rng, slopes = np.random.default_rng(seed), list[float]()
    for _ in range(draws):
        rows = rng.integers(len(x), size=len(x))
        if len(set(x[rows])) > 1:
            slopes.append(_line(x[rows], y[rows])[0])
    low, high = np.quantile(slopes, (0.025, 0.975)) if slopes else (alpha, alpha)
    return Law(alpha, exp(shift), float(low), float(high), tuple(front))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return slope, float(y.mean() - slope * x.mean())


def gmacs(preset: Preset) -> float:
    """Multiply-and-adds of one pass of one picture and one text of full length through the towers, in units of 1e9, as they are computed here: of a
    last block only the token that is read. Nothing is computed for it."""
    from torch.utils.flop_counter import FlopCounterMode

    feed = preset.feed
    with torch.device("meta"):
        system = preset.config.build()
        given: dict[str, Any] = {}
        if feed.image is not None:
            given["encode_image"] = torch.zeros(1, 3, feed.image.size, feed.image.size)
        if feed.text is not None:
            given["encode_text"] = torch.ones(1, feed.text.length, dtype=torch.int64)
    able = {name: value for name, value in given.items() if hasattr(system, name)}
    if not able:
        raise UserError("this system encodes neither pictures nor texts", "compute is counted in its towers")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for name, value in able.items():
            getattr(system.eval(), name)(value)
    return counter.get_total_flops() / 2e9


def seen(preset: Preset, samples: int) -> Preset:
    """The preset with as many steps as show it so many samples, epochs notwithstanding; warm-up keeps its share."""
    stage = preset.stages[0]
    steps = max(1, round(samples / stage.batch_size))
    return preset.but(**{"stages.0.steps": steps, "stages.0.optim.warmup": min(steps, round(stage.optim.warmup * steps / stage.steps))})


def scan_rate(preset: Preset, batches: Callable[[], Iterable[Any]], rates: Sequence[float], *, steps: int = 20, seed: int = 0) -> float:
    """The learning rate whose short warm-up, from the same weights on the same batches, ends with the least loss; what diverges is out of the race.

    UserError where all of them diverge."""
    if not rates or steps < 2:
        raise UserError(f"{len(rates)} rates over {steps} steps", "give at least one rate and two steps")
    found: dict[float, float] = {}
    for rate in rates:
        seed_all(seed)
        stage = preset.stages[0].but(**{"steps": steps, "optim.lr": rate, "optim.warmup": steps // 2, "optim.schedule": "constant"})
        try:
            losses = [s.total for s in fit(preset.config.build(), stage, batches())]
        except Diverged:
            continue
        tail = losses[-max(1, steps // 4):]
        found[rate] = sum(tail) / len(tail)
    if not found:
        raise UserError(f"training diverges at every rate of {', '.join(f'{r:g}' for r in rates)}", "scan smaller ones")
    return min(found, key=lambda r: found[r])
