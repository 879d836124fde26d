"""Volume rendering: from densities along rays to colours. Shapes: R rays, S samples of a ray, near to far, K finer samples."""
from typing import NamedTuple

import torch
from torch import Tensor

HUGE = 1e10                                  # length of the last segment: what is still unseen there is behind everything


class Rendered(NamedTuple):
    """colour [R,3], depth [R] (mean distance of what is seen), opacity [R] (1: nothing shines through), weight [R,S], at [R,S] distances."""
    colour: Tensor
    depth: Tensor
    opacity: Tensor
    weight: Tensor
    at: Tensor


def stratified(near: float, far: float, rays: int, samples: int, like: Tensor, lot: bool) -> Tensor:
    """Distances [R,S]: one in each of S equal parts of [near, far], drawn evenly within it (`lot`) or at its middle (Mildenhall et al. 2020,
    equation 2)."""
    place = torch.rand(rays, samples, device=like.device) if lot else torch.full((rays, samples), 0.5, device=like.device)
    return near + (far - near) * (torch.arange(samples, device=like.device) + place) / samples


def lengths(at: Tensor) -> Tensor:
    """Lengths [R,S] of the segments that begin at distances [R,S]; the last has no end."""
    return torch.cat([at[:, 1:] - at[:, :-1], torch.full_like(at[:, :1], HUGE)], 1)


def weights(density: Tensor, length: Tensor) -> Tensor:
    """How much of what is seen stems from each segment: w_i = T_i alpha_i, alpha_i = 1 - exp(-sigma_i delta_i), T_i = prod_{j<i} (1 - alpha_j)
    (equation 3). density >= 0 and length [R,S] -> [R,S]; they sum to 1 - T_S."""
    optical = density * length
    before = torch.cat([torch.zeros_like(optical[:, :1]), optical[:, :-1]], 1).cumsum(1)
    return torch.exp(-before) * -torch.expm1(-optical)


def composed(weight: Tensor, colour: Tensor, at: Tensor, background: float | None) -> Rendered:
    """weight and at [R,S], colour [R,S,3]; what shines through is a grey of `background` (1: white; None: black, no light)."""
    opacity = weight.sum(1)
    seen = (weight[..., None] * colour).sum(1)
    seen = seen if background is None else seen + background * (1 - opacity)[:, None]
    return Rendered(seen, (weight * at).sum(1), opacity, weight, at)


@torch.no_grad()
def finer(at: Tensor, weight: Tensor, samples: int, lot: bool) -> Tensor:
    """K distances [R,K] drawn by inverting the distribution that is constant between the middles of at [R,S] and there proportional to the
    weights [R,S] (section 5.2). Carries no gradient. `lot`: random quantiles, else evenly spaced ones."""
    edge = (at[:, 1:] + at[:, :-1]) / 2
    chance = weight[:, 1:-1] + 1e-5          # no bin is impossible
    sums = torch.cat([torch.zeros_like(chance[:, :1]), chance.cumsum(1)], 1)
    sums = sums / sums[:, -1:]
    u = torch.rand(len(at), samples, device=at.device) if lot else torch.linspace(0, 1, samples, device=at.device).expand(len(at), -1)
    above = torch.searchsorted(sums, u.contiguous(), right=True).clamp(1, sums.shape[1] - 1)
    low, high = sums.gather(1, above - 1), sums.gather(1, above)
    share = (u - low) / (high - low).clamp_min(1e-8)
    start, end = edge.gather(1, above - 1), edge.gather(1, above)
    return start + share.clamp(0, 1) * (end - start)


def ndc(origin: Tensor, direction: Tensor, scale: tuple[float, float], near: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rays of cameras that look along -z into normalised device coordinates, where distances 0 to 1 go from the plane z = -near to infinity
    (appendix C). scale: (2 f / W, 2 f / H). origin, direction [R,3] -> the same, directions of any length."""
    start = origin + (-(near + origin[:, 2]) / direction[:, 2])[:, None] * direction
    x, y, z = start.unbind(1)
    dx, dy, dz = direction.unbind(1)
    a, b = scale
    return (torch.stack([-a * x / z, -b * y / z, 1 + 2 * near / z], 1),
            torch.stack([-a * (dx / dz - x / z), -b * (dy / dz - y / z), -2 * near / z], 1))
