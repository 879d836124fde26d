"""How a batch becomes gradients: at once, in accumulated parts, or exactly with the activations of one chunk at a time."""
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.batch import Batch, Losses
from polysense.base.errors import UserError
from polysense.base.plan import Stage
from polysense.train.precision import Autocast

Sync = Callable[[bool], AbstractContextManager[Any]]


class Call(nn.Module):
    """`call(function, value)` is `function(system, value)`, as a forward pass: what DDP, FSDP and their hooks can hold on to."""

    def __init__(self, system: nn.Module):
        super().__init__()
        self.system = system

    def forward(self, function: Callable[..., Any], value: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the function returned, as plain dictionaries: (losses or embeddings, what was kept)."""
        out = function(self.system, value)
        return dict(out), getattr(out, "keep", {})


def size_of(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def split(batch: Batch, size: int) -> list[Batch]:
    """Parts of at most `size` samples."""
    parts = {k: v.split(size) for k, v in batch.items()}
    return [dict(zip(parts, p)) for p in zip(*parts.values())]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all parts under each key; scalars are averaged."""
    return {k: torch.cat([p[k] for p in parts]) if parts[0][k].ndim else torch.stack([p[k] for p in parts]).mean() for k in parts[0]}


def backward(model: nn.Module, stage: Stage, batch: Batch, autocast: Autocast, sync: Sync = lambda last: nullcontext()) \
        -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adds the gradients of the stage's loss on `batch` to the parameters; returns (detached loss terms, kept tensors).

    model: a `Call`, or one wrapped for several ranks; sync(last): context of each forward and backward, `last` where ranks may exchange.
    """
    pieces = -(-size_of(batch) // max(1, stage.accumulate))
    if stage.embed and (stage.chunk or stage.accumulate > 1):
        return cached(model, stage, split(batch, stage.chunk or pieces), autocast)
    parts, seen, kept = split(batch, pieces), [], []
    for i, part in enumerate(parts):
        with sync(i == len(parts) - 1):
            with autocast(True):
                losses, keep = model(whole(stage), part)
                total = Losses(**losses).total(stage.weights) * (size_of(part) / size_of(batch))
            total.backward()
        seen.append({k: v.detach() * (size_of(part) / size_of(batch)) for k, v in losses.items()})
        kept.append(keep)
    return {k: torch.stack([s[k] for s in seen]).sum() for k in seen[0]}, joined(kept)


def whole(stage: Stage) -> Callable[..., Losses]:
    """The objective as one function of (system, batch), embedding included."""
    if embed := stage.embed:
        return lambda system, batch: stage.objective(system, embed(system, batch))
    return stage.objective


def cached(model: nn.Module, stage: Stage, parts: list[Batch], autocast: Autocast) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradient caching (Gao et al. 2021, section 3): the gradients of the whole batch with the activations of one part in memory.

    Embed all parts without a graph; differentiate the objective with respect to the embeddings; embed each part again, from the random
    state it had, and push its rows of that gradient through. Exact wherever samples meet only in the objective (so batch norm sees parts).
    """
    device = next(model.parameters()).device
    states, first = [], []
    with torch.no_grad(), autocast(True):
        for part in parts:
            states.append(random_state(device))
            first.append(model(stage.embed, part)[0])
    rows = [size_of(part) for part in parts]
    for name, value in first[0].items():
        if value.ndim == 0 or len(value) != rows[0]:
            raise UserError(f"embed returned {name!r} of shape {tuple(value.shape)} for {rows[0]} samples",
                            "with chunk, every value has one row a sample")
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in joined(first).items()}
    with autocast(True):
        losses, keep = model(stage.objective, leaves)
        total = Losses(**losses).total(stage.weights)
    total.backward()
    state = random_state(device)
    with still_statistics(model), autocast(True):
        for i, (part, before) in enumerate(zip(parts, states)):
            restore_random_state(before, device)
            again, _ = model(stage.embed, part)
            pulled = [(v, g.split(rows)[i]) for k, v in again.items() if v.requires_grad and (g := leaves[k].grad) is not None]
            with autocast(False):
                torch.autograd.backward([v for v, _ in pulled], [g for _, g in pulled])
    restore_random_state(state, device)
    return {k: v.detach() for k, v in losses.items()}, keep


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside go on normalising by the batch but leave their running averages alone: for second passes over the same samples."""
    held = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats]
    for m in held:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in held:
            m.track_running_stats = True
