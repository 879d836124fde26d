"""The learning rate as a pure function of the step: nothing to store, nothing to restore."""
from math import cos, pi

from polysense.base.errors import UserError
from polysense.base.plan import EarlyEnd, Optim, RisingDecay

SCHEDULES = ("cosine", "linear", "constant", "step", "rsqrt", "exponential")


def factor(optim: Optim, step: float, steps: int) -> float:
    """What the base learning rate is multiplied with at `step` (0 for the first one) of a stage of `steps` steps.

    Warm-up rises linearly and reaches 1 at step `warmup - 1`, never starting at 0. After it, with t running from 0 to 1 over the rest:
    `cosine` is final + (1 - final) (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017, equation 5), `linear` falls to `final`, `constant` stays,
    `step` is divided by ten at each milestone (a fraction of the whole stage), `rsqrt` is sqrt(w / step), w being at least 1 (Vaswani et al.
    2017, section 5.3), and not below `final`; `exponential` is final ** t. With EarlyEnd t is 1 from a share of the stage on. Raises UserError
    for an unknown schedule.
    """
    if optim.schedule not in SCHEDULES:
        raise UserError(f"no schedule {optim.schedule!r}", f"the schedules are {', '.join(SCHEDULES)}")
    warmup = min(optim.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    span = steps * optim.over if isinstance(optim, EarlyEnd) else steps
    t = min(1.0, (step - warmup) / max(1, span - warmup))
    match optim.schedule:
        case "cosine":
            return optim.final + (1 - optim.final) * (1 + cos(pi * t)) / 2
        case "linear":
            return optim.final + (1 - optim.final) * (1 - t)
        case "step":
            return 0.1 ** sum(step >= m * steps for m in optim.milestones)
        case "exponential":
            return optim.final ** t
        case "rsqrt":
            return max(optim.final, (max(1, warmup) / max(1, warmup, step)) ** 0.5)
        case _:
            return 1.0


def decayed(optim: Optim, progress: float) -> float | None:
    """The weight decay at a share `progress` of the stage where it moves (RisingDecay), else None: it stays as it is."""
    if not isinstance(optim, RisingDecay):
        return None
    return optim.final_decay + (optim.weight_decay - optim.final_decay) * (1 + cos(pi * min(1.0, progress))) / 2
