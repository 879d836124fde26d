"""What a shallow net has learned lets a deep one begin: D after A reaches a lower training loss than D from random weights in as many steps.

Both D nets see the same batches. Rate and steps were chosen on the first 2,000 test pictures of a fixed shuffle; the accuracy is taken on the
others.
"""
from types import SimpleNamespace

from polysense.base.system import Preset, System
from polysense.data import source
from polysense.proofs.arms import accuracy, drawn, read_all, rest_of, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import vgg
from polysense.train.starts import carry

METRIC, HIGHER_IS_BETTER = "training loss of D whose first four convolutions and dense layers start from A", False
DATA = "mnist (10,000 train at 32 px, 2,000 test), an eighth of the paper's widths"
STEPS = 400


def run(seed: int, chosen: bool = True) -> Outcome:
    shallow, deep = vgg.tiny(), vgg.deeper()
    few, test = some_of(source("mnist"), 10_000, seed), source("mnist", split="test")
    image, label = read_all(shallow.feed, few)

    def trained(plan: Preset, lend: System | None = None) -> tuple[float, float]:
        def prepare(system: System) -> None:
            for start in plan.starts if lend is not None else ():
                carry(start, SimpleNamespace(system=lend), system)  # type: ignore[arg-type]

        plan = plan.but(**{"stages.0.steps": STEPS})
        arm = train_arm("vgg", plan, few, needs=("image", "label"), seed=seed, prepare=prepare, batches=drawn(image, label, 64, seed))
        made.append(arm.subject.system)
        return arm.final_loss, accuracy(arm.subject, (rest_of if chosen else some_of)(test, 2000, 0))

    made: list[System] = []
    a = trained(shallow)
    after_a, fresh = trained(deep, made[0]), trained(deep)
    return Outcome(after_a[0], {"D from N(0, std)": fresh[0]}, {
        "training loss of A": a[0], "test accuracy of A": a[1], "test accuracy of D after A": after_a[1],
        "test accuracy of D from N(0, std)": fresh[1],
        "D after A reaches 0.85": after_a[1] >= 0.85})
