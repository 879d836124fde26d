"""For autograd functions whose backward pass is not itself differentiable."""
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses `create_graph=True`. torch's once_differentiable would let a second derivative silently lose these terms
    wherever the incoming gradient is a constant, as it is for a loss."""
    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("this objective can be differentiated once only: take its gradient without create_graph=True")
        return backward(ctx, *grads)
    return checked
