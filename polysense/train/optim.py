"""Optimisers and their parameter groups: weight decay where it belongs, learning rates that fall along the depth of a tower."""
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from polysense.base.depth import layers, undecayed
from polysense.base.errors import UserError
from polysense.base.plan import AdaptiveClip, LookAhead, Optim, SteadyRates

NAMES = ("adamw", "adam", "sgd", "nesterov", "lars", "lamb", "paged_adamw", "adafactor")
Tensors = list[Tensor] | tuple[Tensor, ...]


def groups(system: nn.Module, optim: Optim, chosen: Callable[[str], bool] = lambda name: True) -> list[dict[str, Any]]:
    """Parameter groups of what is trainable (and `chosen` by name), each parameter in exactly one.

    A group holds `params`, `names`, `scale` (its learning rate is lr * schedule * scale), `weight_decay` and `adapt` (whether LARS and LAMB
    use the trust ratio: where there may be weight decay) and `steady` (whether the schedule leaves it alone). A pattern of `lr_scale` or `steady`
    that matches no parameter is a UserError.
    """
    plain, depth = undecayed(system), layers(n for n, _ in system.named_parameters())
    steady = optim.steady if isinstance(optim, SteadyRates) else ()
    for word, pattern in (*(("lr_scale", p) for p, _ in optim.lr_scale), *(("steady", p) for p in steady)):
        if not any(fnmatch(n, pattern) for n in depth):
            raise UserError(f"{word}={pattern!r} matches no parameter", f"the first names are {', '.join(list(depth)[:4])}")
    out: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, p in system.named_parameters():
        if not p.requires_grad or not chosen(name):
            continue
        layer, top = depth[name]
        scale = optim.layer_decay ** (top - layer)
        for pattern, by in optim.lr_scale:
            scale *= by if fnmatch(name, pattern) else 1.0
        key = (scale, name not in plain, any(fnmatch(name, s) for s in steady))
        group = out.setdefault(key, {"params": [], "names": [], "scale": scale, "adapt": key[1], "steady": key[2], "lr": optim.lr * scale,
                                     "weight_decay": optim.weight_decay if key[1] else 0.0})
        group["params"].append(p)
        group["names"].append(name)
    return list(out.values())


def make_optimizer(system: nn.Module, optim: Optim, chosen: Callable[[str], bool] = lambda name: True) -> Optimizer:
    """The optimiser of a stage over the trainable parameters. torch's fused kernels where torch has them."""
    parts = groups(system, optim, chosen)
    if not parts:
        raise UserError("there is nothing to train", "no trainable parameter was chosen")
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for g in parts for p in g["params"])
    match optim.name:
        case "adamw":
            return AdamW(parts, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
        case "adam":
            return Adam(parts, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
        case "sgd" | "nesterov":
            return SGD(parts, lr=optim.lr, momentum=optim.momentum, nesterov=optim.name == "nesterov", fused=fused)
        case "lars":
            return LARS(parts, lr=optim.lr, momentum=optim.momentum)
        case "paged_adamw":
            from polysense.train.paged import PagedAdamW

            return PagedAdamW(parts, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        case "adafactor":
            from polysense.train.adafactor import Adafactor

            return Adafactor(parts, lr=optim.lr, betas=optim.betas)
        case "lamb":
            return LAMB(parts, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    raise UserError(f"no optimiser {optim.name!r}", f"the optimisers are {', '.join(NAMES)}")


@torch.no_grad()
def clip_units(optim: AdaptiveClip, optimizer: Optimizer, local: Callable[[Tensor], Tensor]) -> None:
    """Shortens in place the gradient of every unit that is longer than `unit_clip` times the unit (Brock et al. 2021, equation 3)."""
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            if p.grad is None or any(fnmatch(name, u) for u in optim.unclipped):
                continue
            weight, grad = local(p.detach()), local(p.grad)
            axes = tuple(range(1, grad.ndim)) if grad.ndim > 1 else tuple(range(grad.ndim))
            most = optim.unit_clip * torch.linalg.vector_norm(weight, dim=axes, keepdim=True).clamp_min(optim.unit_floor)
            grad.mul_((most / torch.linalg.vector_norm(grad, dim=axes, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))


@torch.no_grad()
def look_ahead(optim: LookAhead, optimizer: Optimizer, done: int) -> None:
    """One step of the optimiser, the `done`-th of the stage; behind every `every`-th the slow weights follow. They are kept as its state `slow`."""
    if optim.every < 1 or not 0 < optim.follow <= 1:
        raise UserError(f"every={optim.every}, follow={optim.follow}", "at least 1, and a part of the way in (0, 1]")
    params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    first = {p: p.detach().clone() for p in params if "slow" not in optimizer.state.get(p, {})}
    optimizer.step()
    for p, value in first.items():
        optimizer.state[p]["slow"] = value
    if done % optim.every == 0:
        slow = [optimizer.state[p]["slow"] for p in params]
        torch._foreach_lerp_(slow, [p.detach() for p in params], optim.follow)
        torch._foreach_copy_([p.detach() for p in params], slow)


def trust(weights: Tensors, updates: Tensors, coefficient: float) -> list[Tensor]:
    """coefficient * |w| / |u| of each pair, and 1 where one of the two is zero."""
    pairs = zip(torch._foreach_norm(weights), torch._foreach_norm(updates))
    return [torch.where((w > 0) & (u > 0), coefficient * w / u, torch.ones_like(w)) for w, u in pairs]


class Scaled(Optimizer):
    """What LARS and LAMB share: all tensors of a group go through one sequence of multi-tensor kernels."""

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Tensors:
        """The update before the learning rate, trust ratio included."""
        raise TypeError(f"{type(self).__name__} must say its update")

    def held(self, params: list[Tensor], key: str) -> list[Tensor]:
        """The state tensors called `key`, zero at first."""
        return [self.state[p].setdefault(key, torch.zeros_like(p)) for p in params]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step down the gradients; `closure`, if given, is evaluated first and its value returned, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                torch._foreach_add_(params, self.update(group, params, [p.grad for p in params]), alpha=-group["lr"])
        return loss


class LARS(Scaled):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, algorithm 1; the form of SimCLR and BYOL).

    v <- m v + r (g + d w),  w <- w - lr v,  with r = coefficient |w| / |g + d w|. Groups with `adapt` False (biases, norms) have r = 1.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, coefficient: float = 1e-3):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "coefficient": coefficient, "adapt": True})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        direction = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(direction, trust(params, direction, group["coefficient"]))
        velocity = self.held(params, "momentum_buffer")
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, direction)
        return velocity


class LAMB(Scaled):
    """Layer-wise adaptive moments (You et al. 2020, algorithm 2): Adam's direction, decoupled decay, rescaled to the norm of the weights.

    r = m' / (sqrt(v') + eps),  w <- w - lr |w| / |r + d w| (r + d w), with m', v' the bias-corrected moments. Groups with `adapt` False
    (biases, norms) are not rescaled.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Tensors:
        (one, two), mean, square = group["betas"], self.held(params, "exp_avg"), self.held(params, "exp_avg_sq")
        done = [self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32)) for p in params]
        torch._foreach_add_(done, 1.0)
        torch._foreach_lerp_(mean, grads, 1 - one)
        torch._foreach_mul_(square, two)
        torch._foreach_addcmul_(square, grads, grads, value=1 - two)
        below = torch._foreach_div(square, [1 - two ** float(t) for t in done])
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, group["eps"])
        direction = torch._foreach_div(mean, [1 - one ** float(t) for t in done])
        torch._foreach_div_(direction, below)
        torch._foreach_add_(direction, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(direction, trust(params, direction, 1.0))
        return direction
