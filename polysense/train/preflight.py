"""A second of doubt before the first step: does what is chosen to learn get a gradient, and can one batch be learned at all?

`inspect(system, stage, batches)` yields what is wrong as (reason, advice). It looks at a few samples:

    data          values are finite; masks are True on what is real; not every label or reply is masked away
    losses        finite, and no term silently zero
    gradients     reach everything that the stage chose, and are not zero everywhere
    temperature   a learned scale or temperature that is chosen gets a gradient (one clamped hard at its bound does not)
    negatives     a contrastive stage has some: with all features alike the loss of a pair is the log of how many it is told from
    padding       longer padding changes nothing, where the loss is the same every time
    overfitting   a few steps on one batch lower its loss
    system        whatever `System.doubts` says for itself

Weights, buffers, modes and random states are afterwards as they were: a run with a preflight takes the same steps as one without.
"""
import random
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polysense.base.batch import Batch, Losses, check_batch
from polysense.base.errors import UserError
from polysense.base.plan import Stage
from polysense.base.system import System
from polysense.train.gradients import size_of, whole

SAMPLES, BATCHES, STEPS, RATES, SECONDS = 8, 4, 8, (1e-3, 1e-4), 1.0
TEMPERATURE = re.compile(r"(^|[._])(log_scale|logit_scale|scale|temperature|log_temperature)$")
MASKS = {"text_mask": "text", "chat_reply": "chat", "brief_reply": "brief"}      # batch key of a mask -> of the tokens that it is of
Doubt = tuple[str, str]


def preflight(system: System, stages: Iterable[tuple[Stage, Iterable[Batch]]], needs: Iterable[str]) -> str:
    """Looks at each stage; raises UserError with the first reason not to begin. Returns one line about what was looked at."""
    begun, count, needs = time.monotonic(), 0, tuple(needs)
    with undisturbed(system):
        for stage, batches in stages:
            count += 1
            for reason, advice in inspect(system, stage, batches, needs):
                raise UserError(f"preflight, stage {stage.name}: {reason}", f"{advice}; --no-preflight trains all the same")
    return f"preflight: {count} stage{'s' if count != 1 else ''} looked at in {time.monotonic() - begun:.1f} s"


@contextmanager
def undisturbed(system: System) -> Iterator[None]:
    """Whatever happens inside, weights, buffers, what is trainable, modes and random states are as before."""
    kept = {n: (t, t.detach().clone()) for n, t in (*system.named_parameters(), *system.named_buffers())}
    chosen = [(p, p.requires_grad) for p in system.parameters()]
    modes = [(m, m.training) for m in system.modules()]
    states: tuple[Any, ...] = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (augmentations of others use it)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept.values():
                tensor.copy_(value)
        for p, was in chosen:
            p.grad = None
            p.requires_grad_(was)
        for module, mode in modes:
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def inspect(system: System, stage: Stage, batches: Iterable[Batch], needs: tuple[str, ...]) -> Iterator[Doubt]:
    """Everything that is wrong with a stage, cheapest first. A generator of its own (`Stage.run`) is not followed: only its data are looked at."""
    few = [{k: v.to(system.device) for k, v in b.items()} for b in islice(iter(batches), BATCHES)]
    if not few:
        yield "the data are empty", "look at them with `polysense data show`"
        return
    check_batch(few[0], needs)
    yield from data(few)
    if stage.run is not None:
        return
    system.choose_trainable(stage.trainable)
    system.train()
    wrong = [*gradients(system, stage, few)]
    yield from wrong
    if wrong:
        return
    yield from negatives(system, stage, few[0])
    yield from padding(system, stage, few[0])
    system.train()
    yield from ((said, "the recipe itself says so") for said in system.doubts(few[0]))
    system.train()
    yield from overfitting(system, stage, few[0])


# -- what goes in ---------------------------------------------------------------------------------------------------------------------------

def data(few: list[Batch]) -> Iterator[Doubt]:
    """Of all batches together, as one of them may happen to have no label."""
    for key in few[0]:
        values = [b[key] for b in few if key in b]
        if values[0].is_floating_point() and not all(bool(v.isfinite().all()) for v in values):
            yield f"{key} holds values that are not finite", "clean the data, or the feed that makes them"
        if key in ("label", "box_label") and all(bool((v < 0).all()) for v in values):
            yield f"every {key} of {len(values)} batches is -1, which means none", "use data with labels"
        if values[0].dtype == torch.bool and not any(bool(v.any()) for v in values):
            yield f"{key} is False everywhere: nothing is learned from, or looked at", "look at what makes the mask; True means real"
    for mask, tokens in MASKS.items():
        pairs = [(b[mask], b[tokens]) for b in few if mask in b and tokens in b]
        if any(inverted(m, t) for m, t in pairs):
            yield f"{mask} is True on the padding of {tokens}", "invert it: True stands on what is real"


def inverted(mask: Tensor, tokens: Tensor) -> bool:
    """Whether a mask [B,L] is turned round for some text: True at its end only, on one id again and again, and False on what has several."""
    return any(bool(m[-1]) and not bool(m[0]) and len(t[m].unique()) == 1 and len(t[~m].unique()) > 1 for m, t in zip(mask, tokens))


# -- what comes out -------------------------------------------------------------------------------------------------------------------------

def loss_of(system: System, stage: Stage, batch: Batch, seed: int = 0) -> Losses:
    """The objective on a batch, from random numbers of its own, so that the same weights give the same loss."""
    torch.manual_seed(seed)
    return whole(stage)(system, batch)


def gradients(system: System, stage: Stage, few: list[Batch]) -> Iterator[Doubt]:
    """Batch after batch until everything chosen was reached: a source of several kinds fills one batch with one of them."""
    chosen = {n: p for n, p in system.named_parameters() if p.requires_grad}
    if not chosen:
        yield "nothing is trainable", "look at the stage's trainable patterns"
        return
    reached, moved, still = set[str](), set[str](), dict[str, bool]()
    for batch in few:
        system.zero_grad(set_to_none=True)
        losses = loss_of(system, stage, batch)
        for name, value in losses.items():
            if not bool(value.isfinite()):
                yield f"the loss {name} is {float(value.detach())}", "is every label of a batch masked, or the learning target empty?"
                return
            still[name] = still.get(name, True) and float(value.detach()) == 0
        total = losses.total(stage.weights)
        if not total.requires_grad:
            yield "the loss does not depend on anything trainable", "look at the stage's trainable patterns, and for a detach in the objective"
            return
        total.backward()
        reached |= {n for n, p in chosen.items() if p.grad is not None}
        moved |= {n for n, p in chosen.items() if p.grad is not None and bool(p.grad.ne(0).any())}
        if broken := [n for n, p in chosen.items() if p.grad is not None and not bool(p.grad.isfinite().all())]:
            yield f"the gradient of {broken[0]} is not finite", "look at the objective for a logarithm or a root of zero"
        if reached == chosen.keys() and not any(still.values()):
            break
    if zero := [n for n, always in still.items() if always]:
        yield f"the loss {zero[0]} is exactly zero", "are all of its labels masked away, or is its weight in the recipe zero?"
    if left := sorted(chosen.keys() - reached):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        yield f"no gradient reaches {left[0]}{more}, which is chosen to train", "leave it out of trainable, or use it in the objective"
    if not moved:
        yield "every gradient is exactly zero", "look for a detach in the objective, or a part that was born zero in front of it"
    for name, p in chosen.items():
        if p.numel() == 1 and TEMPERATURE.search(name) and name in reached and name not in moved:
            yield f"the temperature {name} does not move: its gradient is zero", "is it clamped at its bound, or detached?"


def negatives(system: System, stage: Stage, batch: Batch) -> Iterator[Doubt]:
    """With all features of both sides alike nothing can be told apart: the loss is the log of the candidates, and zero where there are none."""
    if stage.embed is None or size_of(batch) < 2:
        return
    with torch.no_grad():
        torch.manual_seed(0)
        seen = stage.embed(system, batch)
        sides = [k for k in ("image", "text", "audio", "video") if k in seen and seen[k].ndim == 2]
        if len(sides) < 2 or len({seen[k].shape for k in sides}) > 1:
            return
        if stage.batch_size < 2:
            yield f"a contrastive stage with batch_size={stage.batch_size} has no negatives", "raise batch_size"
        alike = seen[sides[0]][:1].expand_as(seen[sides[0]]).clone()
        torch.manual_seed(0)
        losses = stage.objective(system, {**seen, **{k: alike for k in sides}})
    if losses and max(float(v) for v in losses.values()) < 1e-4:
        yield "no negatives are counted: the loss of pairs that look all alike is zero", "does the objective compare each pair with the others?"


def padding(system: System, stage: Stage, batch: Batch) -> Iterator[Doubt]:
    """Two more columns of padding, masked, where the batch has a text with its mask and the loss is no matter of chance."""
    pairs = [(m, t) for m, t in MASKS.items() if m in batch and t in batch]
    if not pairs or any(not bool((~batch[m]).any()) for m, _ in pairs if m == "text_mask"):
        return
    system.eval()
    with torch.no_grad():
        first, again = (float(loss_of(system, stage, batch, seed).total(stage.weights)) for seed in (0, 1))
        longer = dict(batch)
        for mask, tokens in pairs:
            off = batch[tokens][~batch[mask]]
            fill = int(off[-1]) if mask == "text_mask" and len(off) else 0
            longer[tokens] = nn.functional.pad(batch[tokens], (0, 2), value=fill)
            longer[mask] = nn.functional.pad(batch[mask], (0, 2), value=False)
        try:
            padded = float(loss_of(system, stage, longer).total(stage.weights))
        except UserError:                                # the text fills all that the system reads
            return
    if first == again and abs(padded - first) > 1e-3 * max(1.0, abs(first)):
        yield f"longer padding changes the loss from {first:.5g} to {padded:.5g}", "a mask is ignored somewhere, or turned round"


def overfitting(system: System, stage: Stage, batch: Batch) -> Iterator[Doubt]:
    """A few steps of AdamW on one batch, with the same random numbers in each; at the first rate that lowers the loss all is well.

    A slow machine does not get through the steps in the second that each rate has: then nothing is said, as nothing is known.
    """
    chosen, hurried = [p for p in system.parameters() if p.requires_grad], False
    before, first, seen = [p.detach().clone() for p in chosen], float("nan"), list[float]()
    for rate in RATES:
        begun, optimizer = time.monotonic(), torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
        for i in range(STEPS + 1):
            system.zero_grad(set_to_none=True)
            total = loss_of(system, stage, batch).total(stage.weights)
            seen.append(float(total.detach()))
            first = seen[0] if isfinite(seen[0]) else first
            if i and seen[-1] < first:
                return
            late = i > 1 and time.monotonic() - begun > SECONDS
            hurried |= late and i < STEPS
            if i == STEPS or late:
                break
            total.backward()
            optimizer.step()
        with torch.no_grad():
            for p, value in zip(chosen, before):
                p.copy_(value)
    if hurried:
        return
    yield (f"one batch cannot be learned: its loss goes from {first:.5g} to no less than {min(seen[1:], default=first):.5g}",
           "is a sign turned round, or a target random from step to step?")
