"""Half of the patches hidden, more pictures seen: at equal time FLIP reads digits better than the same towers on whole pictures.

All arms have the same towers, data and wall-clock time for everything; the last part of FLIP's is spent on whole pictures. The times and sizes
were chosen on 1,000 training pictures held out.
"""
import time
from collections.abc import Callable

from polysense.base.system import Preset, System
from polysense.data import source
from polysense.data.sources import Source
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.proofs.arms import Arm, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.small import digits, fitted, plain_pair, reads_digits
from polysense.systems.align import flip

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy on handwritten digits after equal time", True
DATA = "mnist (8,000 pictures with sentences, 64 patches each; 2,000 for the test)"
SECONDS, TUNE = 32.0, 5.0
NEEDS = ("image", "text")


def plan(ratio: float) -> Preset:
    base = fitted(flip.tiny(), flip.FLIP.Config(**plain_pair(pool="all", position="sincos"), sampler=RandomMask.Config(ratio=ratio)), 100_000)
    return base.but(**{"stages.0.optim.schedule": "constant", "stages.0.optim.warmup": 10, "stages.0.batch_size": 64, "stages.1.batch_size": 64,
                       "stages.1.optim.lr": 5e-4, "stages.1.steps": 100_000, "feed.train_image.flip": 0.0})


def spent(seconds: float) -> Callable[[], float]:
    """A clock that begins when it is first asked."""
    began: list[float] = []

    def clock() -> float:
        began.append(time.perf_counter()) if not began else None
        return min(1.0, (time.perf_counter() - began[0]) / seconds)
    return clock


def arm(ratio: float, train: Source, seed: int) -> tuple[Arm, Arm | None]:
    """Masked for most of the time, then whole for the rest: (after the first part, after both). Nothing hidden: one part."""
    whole = plan(ratio)
    if not ratio:
        return train_arm("flip", whole.but(stages=whole.stages[1:]).but(**{"stages.0.optim": whole.stages[0].optim}), train, needs=NEEDS, seed=seed,
                         clock=spent(SECONDS)), None
    masked = train_arm("flip", whole.but(stages=whole.stages[:1]), train, needs=NEEDS, seed=seed, clock=spent(SECONDS - TUNE))
    state = {k: v.clone() for k, v in masked.subject.system.state_dict().items()}

    def go_on(system: System) -> None:
        system.load_state_dict(state)

    tuned = train_arm("flip", whole.but(stages=whole.stages[1:]), train, needs=NEEDS, seed=seed, clock=spent(TUNE),
                      tokenizer=masked.subject.tokenizer, prepare=go_on)
    return masked, tuned


def run(seed: int, test: Source | None = None) -> Outcome:
    train = digits(8000, seed)
    test = some_of(source("mnist", split="test"), 2000, 0) if test is None else test
    whole, _ = arm(0.0, train, seed)
    half, tuned = arm(0.5, train, seed)
    quarter, _ = arm(0.75, train, seed)
    assert tuned is not None
    seconds = {"whole": SECONDS, "half": SECONDS - TUNE, "quarter": SECONDS - TUNE}
    steps = {"whole": len(whole.losses), "half": len(half.losses), "quarter": len(quarter.losses)}
    return Outcome(reads_digits(tuned.subject, test), {"whole pictures, equal time": reads_digits(whole.subject, test)}, {
        "before unmasked tuning": reads_digits(half.subject, test), "a quarter of the patches, no tuning": reads_digits(quarter.subject, test),
        **{f"pictures a second, {k}": round(64 * n / seconds[k]) for k, n in steps.items()}})
