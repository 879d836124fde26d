"""From noise to a sample: ancestral steps, DDIM, DPM-Solver++ 2M, PLMS. Pure: randomness comes from the `noise` that is handed in.

Each is a generator that yields x after every step, the last x being the sample: whoever iterates may watch, steer (by the network that it hands
in) or differentiate. `denoise(x, t) -> (x_0, e)` is the network, its answer understood (`diffusion.understood`), guided and clipped as its owner
likes; t is an int. `kept` [T] is the schedule (`diffusion.kept_share`).
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from collections.abc import Callable, Iterator, Sequence
from math import exp, log

import torch
from torch import Tensor

from polysense.objectives.diffusion import posterior

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Noise = Callable[[Tensor], Tensor]
SPACINGS, SAMPLERS = ("leading", "linspace", "trailing"), ("ddpm", "ddim", "dpm", "plms")


def times(total: int, steps: int, spacing: str = "leading", offset: int = 0, ends: bool = True) -> list[int]:
    """`steps` of the times 0 .. total-1, falling (Lin et al. 2024, table 2, names the spacings).

    ends False: one more is laid out and the lowest left away, as solvers do that go from the last time to zero noise at once.
    Raises ValueError for more steps than times, fewer than one, or another spacing.
    """
    if not 1 <= steps <= total or spacing not in SPACINGS:
        raise ValueError(f"{steps} steps of {total}, spacing {spacing!r}: at least one, at most all; {', '.join(SPACINGS)}")
    laid = steps + (0 if ends or steps == total else 1)
    if spacing == "trailing":
        return [round(total - i * total / steps) - 1 for i in range(steps)]
    if spacing == "linspace":
        at = torch.linspace(0, total - 1, laid, dtype=torch.float64).round().long().tolist() if laid > 1 else [total - 1]
    else:
        at = [min(i * (total // laid) + offset, total - 1) for i in range(laid)]
    return at[::-1][:steps]


def _after(kept: Tensor, at: Sequence[int], i: int, last: float) -> Tensor:
    return kept[at[i + 1]] if i + 1 < len(at) else kept.new_tensor(last)


def ddpm(denoise: Denoise, x: Tensor, kept: Tensor, at: Sequence[int], *, variance: str = "large",
         noise: Noise = torch.randn_like) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), respaced where `at` leaves times out (Nichol & Dhariwal 2021, section 4).

    x_{t-1} = mean + sigma_t z, with z = 0 in the last step.
    """
    for i, t in enumerate(at):
        mean, deviation = posterior(x, denoise(x, t)[0], kept[t].view(1), _after(kept, at, i, 1.0).view(1), variance)
        x = mean if i + 1 == len(at) else mean + deviation.to(x.dtype) * noise(x)
        yield x


def ddim_move(start: Tensor, e: Tensor, then: float) -> Tensor:
    """x at the time whose kept share is `then`, on the straight way through x_0 and e: forwards (inversion) or backwards."""
    return then ** 0.5 * start + (1 - then) ** 0.5 * e


def ddim(denoise: Denoise, x: Tensor, kept: Tensor, at: Sequence[int], *, eta: float = 0.0, last: float = 1.0,
         noise: Noise = torch.randn_like) -> Iterator[Tensor]:
    """Song et al. 2021 (DDIM), equation 12: eta 0 is deterministic, 1 ancestral with the small variance. last: kept share at the end."""
    for i, t in enumerate(at):
        start, e = denoise(x, t)
        now, then = float(kept[t]), float(_after(kept, at, i, last))
        deviation = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x = then ** 0.5 * start + max(1 - then - deviation ** 2, 0.0) ** 0.5 * e
        if deviation:
            x = x + deviation * noise(x)
        yield x


def dpm(denoise: Denoise, x: Tensor, kept: Tensor, at: Sequence[int]) -> Iterator[Tensor]:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2): a second-order multistep solver in lambda = log(A / B), first order at both ends."""
    lam = [0.5 * log(float(kept[t]) / (1 - float(kept[t]))) for t in at]
    former: Tensor | None = None
    for i, t in enumerate(at):
        start, _ = denoise(x, t)
        if i + 1 == len(at):                 # to zero noise: lambda is infinite there and the step is x_0 itself
            yield start
            return
        h = lam[i + 1] - lam[i]
        d = start if former is None else start + (start - former) * (0.5 * h / (lam[i] - lam[i - 1]))
        now, then = float(kept[t]), float(kept[at[i + 1]])
        x = ((1 - then) / (1 - now)) ** 0.5 * x - then ** 0.5 * (exp(-h) - 1) * d
        former = start
        yield x


def plms(denoise: Denoise, x: Tensor, kept: Tensor, at: Sequence[int], *, last: float = 1.0) -> Iterator[Tensor]:
    """Pseudo linear multistep (Liu et al. 2022, PNDM), begun with one improved Euler step as latent diffusion does: steps + 1 network calls."""
    seen: list[Tensor] = []

    def move(e: Tensor, now: float, then: float) -> Tensor:
        return ddim_move((x - (1 - now) ** 0.5 * e) / now ** 0.5, e, then)

    for i, t in enumerate(at):
        now, then = float(kept[t]), float(_after(kept, at, i, last))
        seen = [*seen[-3:], denoise(x, t)[1]]
        if len(seen) == 1 and i + 1 < len(at):
            e = (denoise(move(seen[0], now, then), at[i + 1])[1] + seen[0]) / 2
        elif len(seen) <= 2:
            e = seen[-1] if len(seen) == 1 else (3 * seen[-1] - seen[-2]) / 2
        elif len(seen) == 3:
            e = (23 * seen[-1] - 16 * seen[-2] + 5 * seen[-3]) / 12
        else:
            e = (55 * seen[-1] - 59 * seen[-2] + 37 * seen[-3] - 9 * seen[-4]) / 24
        x = move(e, now, then)
        yield x
