"""Gaussian diffusion as pure functions. `kept` is the share of the signal's variance that is left at time t, alpha_bar in the paper.

Two notations meet here. Ho et al. 2020 (DDPM): x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) e, beta_t, alpha_t = 1 - beta_t. The other
writes one step as x_t = a_t x_{t-1} + b_t e_t with a_t^2 + b_t^2 = 1, and all steps up to t as x_t = A_t x_0 + B_t e with A_t = a_1 ... a_t and
B_t = sqrt(1 - A_t^2). So a_t = sqrt(1 - beta_t), b_t = sqrt(beta_t), A_t = sqrt(alpha_bar_t) = sqrt(kept).

e_t, the noise of the last step, and e, the total noise, are different things. A network that predicts e ("noise" below, the usual one) says
of the last step's noise (b_t / B_t) e: `last_noise`. Then the loss ||e - (B_t / b_t) eps_theta||^2 is the plain ||e - eps_net||^2; the weight
b_t^2 / a_t^2 that the variational bound would put before it is dropped (Ho et al., equation 14).

Times are 0 .. T-1 as in released code: index t holds what the papers call step t + 1.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from itertools import pairwise
from math import cos, pi

import torch
from torch import Tensor

SCHEDULES, TARGETS, VARIANCES = ("linear", "scaled_linear", "cosine"), ("noise", "velocity", "start"), ("large", "small")


def betas(kind: str, steps: int, low: float = 1e-4, high: float = 0.02) -> Tensor:
    """[T] variances of the noise of each step, float64.

    "linear": low to high (Ho et al. 2020, section 4); "scaled_linear": linear in the square root (latent diffusion); "cosine": Nichol & Dhariwal
    2021, equation 17, at most 0.999; low and high are then not read. Raises ValueError for another name.
    """
    if kind == "linear":
        return torch.linspace(low, high, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(low ** 0.5, high ** 0.5, steps, dtype=torch.float64) ** 2
    if kind == "cosine":
        left = [cos((i / steps + 0.008) / 1.008 * pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(left)], dtype=torch.float64)
    raise ValueError(f"no schedule {kind!r}: the schedules are {', '.join(SCHEDULES)}")


def kept_share(beta: Tensor) -> Tensor:
    """beta [T] -> kept [T] = prod(1 - beta), which is A_t^2."""
    return (1 - beta).cumprod(0)


def _to(kept: Tensor, x: Tensor) -> Tensor:
    return kept.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def noised(x: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """A x + B e: x, noise [B,...], kept [B] -> [B,...] (Ho et al. 2020, equation 4)."""
    k = _to(kept, x)
    return k.sqrt() * x + (1 - k).sqrt() * noise


def target(x: Tensor, noise: Tensor, kept: Tensor, predict: str = "noise") -> Tensor:
    """What the network should say: "noise" e, "velocity" A e - B x (Salimans & Ho 2022, appendix D), "start" x. All [B,...]."""
    if predict == "noise":
        return noise
    if predict == "start":
        return x
    if predict == "velocity":
        k = _to(kept, x)
        return k.sqrt() * noise - (1 - k).sqrt() * x
    raise ValueError(f"no target {predict!r}: the targets are {', '.join(TARGETS)}")


def understood(said: Tensor, x: Tensor, kept: Tensor, predict: str = "noise") -> tuple[Tensor, Tensor]:
    """What the network said about x_t -> (x_0, e), both [B,...]: the inverse of `target`."""
    k = _to(kept, x)
    a, b = k.sqrt(), (1 - k).sqrt()
    if predict == "noise":
        return (x - b * said) / a, said
    if predict == "start":
        return said, (x - a * said) / b
    if predict == "velocity":
        return a * x - b * said, a * said + b * x
    raise ValueError(f"no target {predict!r}: the targets are {', '.join(TARGETS)}")


def last_noise(noise: Tensor, kept: Tensor, before: Tensor) -> Tensor:
    """The total noise e -> what it says of the last step's noise, (b_t / B_t) e, with b_t^2 = 1 - kept / before."""
    return noise * _to(((1 - kept / before) / (1 - kept)).sqrt(), noise)


def step_back(x: Tensor, last: Tensor, kept: Tensor, before: Tensor) -> Tensor:
    """Mean of x_{t-1}, (x_t - b_t eps_theta) / a_t, from the last step's noise; equals `posterior`'s mean for an unclipped x_0."""
    a2 = kept / before
    return (x - _to((1 - a2).sqrt(), x) * last) / _to(a2.sqrt(), x)


def posterior(x: Tensor, start: Tensor, kept: Tensor, before: Tensor, variance: str = "large") -> tuple[Tensor, Tensor]:
    """(mean [B,...], deviation [B]) of x_{t-1} given x_t and x_0; `before` [B] is kept at the time stepped to (1 at the very end).

    variance: "large" is b_t^2, right for x_0 ~ N(0, I), "small" is b_t^2 B_{t-1}^2 / B_t^2, right for a single x_0 (Ho et al. 2020, equations 6
    and 7, section 3.2).
    """
    if variance not in VARIANCES:
        raise ValueError(f"no variance {variance!r}: the variances are {', '.join(VARIANCES)}")
    a2 = kept / before
    b2 = 1 - a2
    mean = _to(before.sqrt() * b2 / (1 - kept), x) * start + _to(a2.sqrt() * (1 - before) / (1 - kept), x) * x
    return mean, (b2 if variance == "large" else b2 * (1 - before) / (1 - kept)).sqrt()


def guided(free: Tensor, given: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: free + scale (given - free) (Ho & Salimans 2022; scale 1 is the conditional prediction, 0 the free one)."""
    return free + scale * (given - free)


def noise_loss(said: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over everything: the simple loss (Ho et al. 2020, equation 14). Scalar."""
    return torch.nn.functional.mse_loss(said.float(), wanted.float())
