"""Taught by a CLIP first, then tuned: at equal time EVA-CLIP reads digits better than the same towers that begin from nothing.

A small CLIP learns digits with sentences; it is the teacher. One arm spends the first part of its time on the teacher's features of hidden patches,
takes the teacher's text tower and spends the rest on contrast; its rival spends all of it on contrast from scratch. Noted are the rival that is lent
the text tower, so that the image tower alone begins from nothing, and AdamW in place of LAMB after the same teaching. Time is that of the processor,
so that neighbours on the machine do not count; pictures lie in memory, so that it is spent on the towers.
"""
import time
from collections.abc import Callable
from typing import Any

from polysense.base.system import Preset, Start, System
from polysense.data import source
from polysense.data.sources import Source
from polysense.proofs.arms import Arm, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.imagebind import SIZE, pair
from polysense.proofs.pool import batches, drawn_once
from polysense.proofs.small import digits, reads_digits
from polysense.systems.align import eva_clip
from polysense.towers.eva import eva02
from polysense.train.starts import carry

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy on handwritten digits after equal time", True
DATA = "mnist (4,000 pictures with sentences, 16 patches each; 2,000 for the test)"
TEACHER_STEPS, TEACH, TUNE = 200, 20.0, 25.0
NEEDS = ("image", "text")
TOWER = eva02(SIZE, 7, 96, 3, 3, grid=4)


class Lender:
    """What `carry` takes from."""

    def __init__(self, system: System):
        self.system = system


def spent(seconds: float) -> Callable[[], float]:
    """A clock of processor time that begins when it is first asked."""
    began: list[float] = []

    def clock() -> float:
        began.append(time.process_time()) if not began else None
        return min(1.0, (time.process_time() - began[0]) / seconds)
    return clock


def plans(lent: Any) -> tuple[Preset, Preset]:
    """(teaching, tuning) for the configuration of a CLIP."""
    flat = {"stages.0.optim.warmup": 10, "stages.0.steps": 100_000, "stages.0.batch_size": 64}
    view = {"feed.image.size": SIZE, "feed.train_image.size": SIZE, "feed.train_image.flip": 0.0}
    taught = eva_clip.tiny_mim()
    taught = eva_clip.mim(SIZE, TOWER, 6, 2, lent.vision, lent.image_head, 64, (), "mnist", taught.stages[0]).but(**flat, **view)
    of = eva_clip.config(TOWER, lent.text, 64, 0.5)
    tuned = eva_clip.tiny().but(config=of, **flat, **view, **{"feed.text.vocab": lent.text.vocab, "feed.text.length": lent.text.length})
    return taught, tuned.but(**{"stages.0.optim": eva_clip.optim(of, 2e-2, weight_decay=0.05, warmup=10)})


def arms(seed: int, train: Source, test: Source) -> dict[str, float]:
    lent = pair()[0].but(**{"stages.0.steps": TEACHER_STEPS})
    teacher = train_arm("clip", lent, train, needs=NEEDS, seed=seed)
    (taught, tuned), words = plans(lent.config), teacher.subject.tokenizer
    whole = drawn_once(train, tuned.feed, words, NEEDS)

    def stand(*starts: Start, of: Arm) -> Callable[[System], None]:
        def lend(system: System) -> None:
            for start in starts:
                carry(start, Lender(of.subject.system), system)  # type: ignore[arg-type]
        return lend

    text = Start(into="text", from_="clip", take="text")
    eva = train_arm("eva_clip", taught, train, needs=("image",), seed=seed, clock=spent(TEACH), batches=batches(whole, 64, seed),
                    prepare=stand(Start(into="target.tower", from_="clip", take="vision"), Start(into="target.head", from_="clip", take="image_head"),
                                  of=teacher))

    def both(system: System) -> None:
        stand(text, of=teacher)(system)
        stand(Start(into="vision", from_="eva_clip", take="encoder"), of=eva)(system)

    adamw = tuned.but(**{"stages.0.optim": tuned.stages[0].optim.but(name="adamw", lr=2e-3, lr_scale=())})
    out = {"teacher": reads_digits(teacher.subject, test)}
    for name, plan, prepare, seconds in (("taught", tuned, both, TUNE), ("taught, AdamW", adamw, both, TUNE),
                                         ("from scratch", tuned, None, TEACH + TUNE),
                                         ("from scratch, text tower lent", tuned, stand(text, of=teacher), TEACH + TUNE)):
        arm = train_arm("eva_clip", plan, train, needs=NEEDS, seed=seed, tokenizer=words, prepare=prepare, clock=spent(seconds),
                        batches=batches(whole, 64, seed))
        out[name], out[f"steps, {name}"] = reads_digits(arm.subject, test), len(arm.losses)
    out["steps of teaching"] = len(eva.losses)
    return out


def run(seed: int, test: Source | None = None) -> Outcome:
    found = arms(seed, digits(4000, seed), some_of(source("mnist", split="test"), 2000, 0) if test is None else test)
    return Outcome(found.pop("taught"), {"from scratch, equal time": found.pop("from scratch")}, found)
