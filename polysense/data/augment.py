"""RandAugment and random erasing: what vision transformers need in place of the priors of convolutions. All pictures are float [N,3,S,S] in [0,1].

RandAugment (Cubuk et al. 2020) in the form that DeiT and NFNet train with: of fifteen operations each picture gets `operations` at random, each
applied with a chance of a half, whose strength grows with the magnitude on all of them and varies by a normal of deviation `vary`. Erasing (Zhong et
al. 2020) fills one rectangle with noise. Every picture draws its own random numbers, from two of those of its view.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import equalize
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import AugmentOnlyPlan, AugmentPlan

GREY = 0.5                                              # of what a shifted picture leaves free
Change = Callable[[Tensor, Tensor, Tensor], Tensor]     # pictures [N,3,S,S], strengths [N] in [0,1], signs [N] -> pictures


def _each(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1).float()


def _stretched(x: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)


def _posterized(x: Tensor, v: Tensor) -> Tensor:
    step = _each(2.0 ** (8 - (4 - (4 * v).floor())))
    return ((x * 255 / step + 1e-4).floor() * step / 255).clamp(0, 1)


def _blended(x: Tensor, other: Tensor, by: Tensor) -> Tensor:
    """other + (1 + by) * (x - other): by < 0 towards the other, by > 0 away from it."""
    return torch.lerp(other.expand_as(x), x, _each(1 + by)).clamp(0, 1)


def _smoothed(x: Tensor) -> Tensor:
    kernel = x.new_ones(3, 3)
    kernel[1, 1] = 5
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), (kernel / 13).expand(3, 1, 3, 3), groups=3)


def _moved(x: Tensor, angle: Tensor | float = 0.0, shear: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
           shift: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)) -> Tensor:
    """Rotated by `angle` (radians), sheared, shifted by a share of the side; what comes from outside is grey."""
    zero = x.new_zeros(len(x))
    a, sx, sy, tx, ty = (zero + v for v in (angle, *shear, *shift))
    rows = torch.stack([torch.stack([a.cos(), -a.sin() + sx, 2 * tx], 1), torch.stack([a.sin() + sy, a.cos(), 2 * ty], 1)], 1)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x - GREY, grid, align_corners=False) + GREY


OPERATIONS: dict[str, Change] = {
    "autocontrast": lambda x, v, s: _stretched(x),
    "equalize": lambda x, v, s: equalize(x),
    "invert": lambda x, v, s: 1 - x,
    "rotate": lambda x, v, s: _moved(x, angle=s * v * math.radians(30)),
    "posterize": lambda x, v, s: _posterized(x, v),
    "solarize": lambda x, v, s: torch.where(x >= _each(1 - v), 1 - x, x),
    "solarize_add": lambda x, v, s: torch.where(x < 0.5, (x + _each(v) * 110 / 255).clamp(max=1), x),
    "color": lambda x, v, s: _blended(x, rgb_to_grayscale(x), s * v * 0.9),
    "contrast": lambda x, v, s: _blended(x, rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), s * v * 0.9),
    "brightness": lambda x, v, s: (x * _each(1 + s * v * 0.9)).clamp(0, 1),
    "sharpness": lambda x, v, s: _blended(x, _smoothed(x), s * v * 0.9),
    "shear_x": lambda x, v, s: _moved(x, shear=(s * v * 0.3, 0.0)),
    "shear_y": lambda x, v, s: _moved(x, shear=(0.0, s * v * 0.3)),
    "translate_x": lambda x, v, s: _moved(x, shift=(s * v * 0.45, 0.0)),
    "translate_y": lambda x, v, s: _moved(x, shift=(0.0, s * v * 0.45)),
}


def augmented(plan: AugmentPlan, u: Tensor, image: Tensor) -> Tensor:
    """The plan's operations on image [B,3,S,S] in [0,1], then erasing; u [B,2] uniform, all that a picture's own random numbers come from."""
    if not plan.operations and not plan.erase:
        return image
    n, changes = plan.operations, list(OPERATIONS.values())
    if isinstance(plan, AugmentOnlyPlan):
        if not plan.only or set(plan.only) - set(OPERATIONS):
            raise UserError(f"only={plan.only} names no operations of RandAugment", f"they are {', '.join(OPERATIONS)}")
        changes = [OPERATIONS[name] for name in plan.only]
    own = torch.stack([torch.rand(4 * n + 6, generator=torch.Generator().manual_seed(int(a * 2 ** 24) << 24 | int(b * 2 ** 24)))
                       for a, b in u.double().tolist()])
    for which, how, sign, chance in (numbers.unbind(1) for numbers in own[:, :4 * n].view(len(own), n, 4).unbind(1)):
        strength = ((plan.magnitude + plan.vary * math.sqrt(2) * torch.erfinv((2 * how - 1).clamp(-0.9999, 0.9999))) / 10).clamp(0, 1)
        number = torch.where(chance < 0.5, (which * len(changes)).long(), -1)
        for k, change in enumerate(changes):
            rows = (number == k).nonzero()[:, 0]
            if len(rows):
                image = image.index_copy(0, rows, change(image[rows], strength[rows], (sign[rows] < 0.5).float() * 2 - 1))
    return erased(plan.erase, own[:, 4 * n:], u, image)


def erased(chance: float, own: Tensor, u: Tensor, image: Tensor) -> Tensor:
    """With a chance, a rectangle of 2 to 33 % of the area and of ratio 0.3 to 3.3 becomes noise. own [B,6] uniform."""
    side, image = image.shape[-1], image.clone()
    for i in (own[:, 0] < chance).nonzero()[:, 0].tolist():
        _, size, ratio, y, x, _ = own[i].tolist()
        area, ratio = (0.02 + (1 / 3 - 0.02) * size) * side * side, math.exp(math.log(0.3) * (1 - 2 * ratio))
        h, w = (max(1, min(side - 1, round(v))) for v in (math.sqrt(area * ratio), math.sqrt(area / ratio)))
        top, left = int(y * (side - h + 1)), int(x * (side - w + 1))
        generator = torch.Generator().manual_seed(int(float(u[i, 0]) * 2 ** 24) ^ 0x5EED)
        image[i, :, top:top + h, left:left + w] = 0.5 + 0.25 * torch.randn(3, h, w, generator=generator)
    return image
