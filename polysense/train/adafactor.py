"""Adafactor as large image models are trained with it (Shazeer and Stern 2018; Zhai et al. 2022, Scaling Vision Transformers, section 3.4)."""
from typing import Any

import torch
from torch import Tensor

from polysense.train.optim import Scaled
from polysense.train.parallel import alike, whole_tensor


class Adafactor(Scaled):
    """Adam's direction with second moments kept as one row and one column, and first moments in half precision.

    V <- b V + (1 - b) (g^2 + eps),  b = min(cap, 1 - t^-0.8),  u = g / sqrt(V),  m <- one m + (1 - one) u,  w <- w - lr (m + d w).

    Of a tensor whose two longest axes are `least` long or longer, V is rows x columns / mean(rows), the means of g^2 along each of the two; of others
    it is kept whole. Nothing is corrected for its beginning, no step is shortened, and the rate does not depend on the weights' size. Unlike the
    authors' code, the decay d is multiplied by the whole rate, as in AdamW: their 1e-4 at a rate of 1e-3 is 0.1 here.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0, least: int = 32,
                 eps: float = 1e-30):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "least": least, "eps": eps, "adapt": True})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        one, cap = group["betas"]
        out = list[Tensor]()
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            done = state.setdefault("step", torch.zeros((), dtype=torch.float32)).add_(1)
            mean = state.setdefault("exp_avg", torch.zeros_like(p, dtype=torch.bfloat16))
            if mean.dtype != torch.bfloat16:             # torch loads every state in the type of its weight; its values are still those of bfloat16
                mean = state["exp_avg"] = mean.bfloat16()
            direction = g.float() * self.scale(state, g.float().square().add_(group["eps"]), min(cap, 1 - float(done) ** -0.8), group["least"])
            mean.copy_(mean.float().lerp_(direction, 1 - one))
            out.append(mean.to(p.dtype).add(p, alpha=group["weight_decay"]))
        return out

    def scale(self, state: dict[str, Any], squared: Tensor, keep: float, least: int) -> Tensor:
        """One over the root of the second moment, which moves towards `squared` by 1 - keep; it broadcasts to the shape of the gradient."""
        longest = sorted(range(squared.ndim), key=lambda axis: squared.shape[axis])[-2:]
        if len(longest) < 2 or squared.shape[longest[0]] < least:
            return state.setdefault("exp_avg_sq", torch.zeros_like(squared)).lerp_(squared, 1 - keep).rsqrt()
        short, long = longest
        means = {"rows": whole_tensor(squared.mean(long, keepdim=True)), "columns": whole_tensor(squared.mean(short, keepdim=True))}
        rows, columns = (state.setdefault(name, torch.zeros_like(mean)).lerp_(mean, 1 - keep) for name, mean in means.items())
        return alike((rows / rows.mean(short, keepdim=True)).rsqrt(), squared) * alike(columns.rsqrt(), squared)
