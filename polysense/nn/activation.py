"""Activations by name."""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError

STEEP = 1.702


class _QuickGELU(torch.autograd.Function):
    """silu(a x) / a with one fused kernel each way; keeps the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * STEEP, inplace=True).div_(STEEP)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, = ctx.saved_tensors
        if torch.is_grad_enabled():          # a gradient of the gradient is wanted, which the fused kernel does not have
            s = torch.sigmoid(x * STEEP)
            return grads[0] * s * (1 + STEEP * x * (1 - s))
        return torch.ops.aten.silu_backward(grads[0], x * STEEP)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of OpenAI's CLIP weights (LAION's use the exact GELU)."""
    return _QuickGELU.apply(x)  # type: ignore[no-any-return]


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu, "relu": F.relu, "squared_relu": squared_relu,
    "silu": F.silu, "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; UserError names the known ones."""
    if name not in ACTIVATIONS:
        raise UserError(f"no activation {name!r}", f"the activations are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
