"""What moves in a stage besides the system's own weights: optimisers, averaged weights, how far it is. All of it goes into checkpoints."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from functools import partial
from math import isfinite
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from polysense.base.errors import UserError
from polysense.base.plan import AdaptiveClip, LookAhead, Stage
from polysense.base.system import System
from polysense.train.gradients import Call, still_statistics
from polysense.train.optim import clip_units, look_ahead, make_optimizer
from polysense.train.parallel import BLOCK, World, local, total_norm
from polysense.train.precision import autocast
from polysense.train.schedule import decayed, factor


class Average:
    """Exponential moving average of the trained weights: a <- d a + (1 - d) w after every step, started at w (Polyak & Juditsky 1992)."""

    def __init__(self, system: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise UserError(f"ema={decay} is not a decay", "it lies between 0 and 1, for example 0.999")
        self.decay, self.system = decay, system
        self.weights = {n: p.detach().clone() for n, p in system.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def move(self) -> None:
        now = dict(self.system.named_parameters())
        torch._foreach_lerp_([local(v) for v in self.weights.values()], [local(now[n].detach()) for n in self.weights], 1 - self.decay)


class Training:
    """A stage under way: freezes what the stage does not train, wraps the system for the world, owns the optimisers and the average.

    `index` is the number of steps done. A recipe's own generator (`Stage.run`) gets this object and takes its steps through
    `optimizer_for` and `descend`, so schedule, clipping, ranks and checkpoints work for it as for `fit`.
    """

    def __init__(self, system: System, stage: Stage, world: World | None = None):
        self.system, self.stage, self.world = system, stage, world or World(next(system.parameters()).device)
        self.autocast = autocast(stage.precision, self.world.device)
        self.index, self.progress, self.norm = 0, 0.0, 0.0
        self.health: dict[str, float] = {}               # of the last step; empty where nobody looked
        system.choose_trainable(stage.trainable)
        system.train()
        caching = bool(stage.embed and (stage.chunk or stage.accumulate > 1))
        self.model = self.world.wrap(Call(system), whole_batches=not caching and stage.run is None)
        self.optimizers: dict[str, Optimizer] = {}
        self.waiting: dict[str, dict[str, Any]] = {}     # loaded state of optimisers that a recipe has not asked for yet
        self.average = Average(system, stage.ema) if stage.ema is not None else None

    def optimizer_for(self, name: str = "main", pattern: str = "*") -> Optimizer:
        """The optimiser called `name`, made at the first call over the trainable parameters that match `pattern`."""
        if name not in self.optimizers:
            self.optimizers[name] = make_optimizer(self.system, self.stage.optim, lambda n: fnmatch(n, pattern))
            if name in self.waiting:
                self.restore(name, self.waiting.pop(name))
        return self.optimizers[name]

    def descend(self, total: Tensor, optimizer: Optimizer) -> float:
        """zero_grad, backward, clip, step; the gradient norm before clipping. For recipes with their own generator.

        A gradient that is not finite moves nothing, and `fit` stops the run when the generator yields.
        """
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.norm = float(self.gather_gradients(optimizer))
        if isfinite(self.norm):
            self.step(optimizer, self.norm)
        return self.norm

    def gather_gradients(self, optimizer: Optimizer) -> Tensor:
        """Averages over ranks what no wrapper did; the norm of all gradients of the optimiser."""
        self.world.settle()
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            raise UserError("no gradient reaches the trainable parameters", "look at the stage's trainable patterns and objective")
        return total_norm(grads)

    def step(self, optimizer: Optimizer, norm: float) -> None:
        """One optimiser step with this moment's learning rate, gradients clipped to the stage's largest norm."""
        clip, lr = self.stage.optim.clip, self.lr()
        decay = decayed(self.stage.optim, self.index / self.stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = (self.stage.optim.lr if group["steady"] else lr) * group["scale"]
            if decay is not None and group["weight_decay"]:
                group["weight_decay"] = decay
        if clip is not None and norm > clip:
            grads = [local(p.grad) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            torch._foreach_mul_(grads, clip / (norm + 1e-6))
        if isinstance(self.stage.optim, AdaptiveClip):
            clip_units(self.stage.optim, optimizer, local)
        if isinstance(self.stage.optim, LookAhead):
            look_ahead(self.stage.optim, optimizer, self.index + 1)
        else:
            optimizer.step()

    def lr(self) -> float:
        """The learning rate of the next step, before the groups' scales. A time budget can run ahead of the steps: the decay follows the time,
        but warm-up is counted in steps, or on a slow machine the first few would take the full rate."""
        optim, steps = self.stage.optim, self.stage.steps
        return optim.lr * min(factor(optim, self.index, steps), factor(optim, max(self.index, self.progress * steps), steps))

    # for checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Optimiser state by parameter name and the averaged weights."""
        out = {f"ema.{n}": v for n, v in self.average.weights.items()} if self.average else {}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for label, p in zip(group["names"], group["params"]):
                    out |= {f"optimizer.{name}.{k}.{label}": v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
        return out

    def load(self, tensors: dict[str, Tensor], index: int) -> None:
        """Inverse of `tensors`, for the stage's step `index`. Raises UserError where the averaged weights do not fit."""
        self.index = index
        if self.average:
            for name, value in self.average.weights.items():
                if f"ema.{name}" not in tensors:
                    raise UserError(f"the checkpoint has no average of {name}", "was the stage's ema changed?")
                value.copy_(tensors[f"ema.{name}"])
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, name, kind, label = key.split(".", 3)
                self.waiting.setdefault(name, {}).setdefault(label, {})[kind] = value
        for name in list(self.optimizers) if self.stage.run else ["main"]:
            if name in self.waiting:
                self.optimizers.pop(name, None)
                self.optimizer_for(name)

    def restore(self, name: str, state: dict[str, Any]) -> None:
        optimizer, at = self.optimizers[name], 0
        by_number = {}
        for group in optimizer.param_groups:
            for label in group["names"]:
                if label in state:
                    by_number[at] = state[label]
                at += 1
        optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def equipped(system: nn.Module, stage: Stage) -> Iterator[None]:
    """The options of a stage that change how modules run, switched on inside and off again behind it.

    compile: each tower, head and other child of the system through torch.compile. checkpoint_activations: each block keeps its input only and
    is run again in the backward pass (Chen et al. 2016), from the same random state and without moving batch statistics twice.
    """
    compiled = [m for m in system.children() if stage.compile]
    blocks = [m for n, m in system.named_modules() if stage.checkpoint_activations and BLOCK.search(n)]
    if compiled and next(system.parameters()).device.type == "cpu" and not any(map(which, ("c++", "g++", "clang++", "cl"))):
        raise UserError("torch.compile needs a C++ compiler here", "install g++ or clang, or train without compile")
    if stage.checkpoint_activations and not blocks:
        raise UserError("checkpoint_activations finds no blocks", "it works on modules named blocks.{i} and stages.{s}.{b}")
    try:
        for m in blocks:
            m.forward = partial(checkpoint, m.forward, use_reentrant=False, context_fn=partial(twice, m))
        for m in compiled:
            m.compile()
        yield
    finally:
        for m in compiled:
            m._compiled_call_impl = None
        for m in blocks:
            del m.forward


def twice(module: nn.Module) -> tuple[Any, Any]:
    """Contexts of the first and of the second run of a checkpointed block."""
    return nullcontext(), still_statistics(module)


Names = Callable[[list[int]], list[str]]
