"""The upper half of a transformer's blocks is most of what full tuning gains over a new head alone.

A ViT of four blocks that learned to read the handwritten digits from zero to four is carried to those from five to nine with 1,000 labels: the head
alone, the last block, the last two, norms alone, everything; for as many steps. Carried from drawn scenes of digits it had to learn anew, below as
well: on validation pictures the last two blocks regained less than was asked. As filed, the last two blocks, less than half of the weights, regain
most of what full tuning gains over the head, though less than nine tenths.
"""
import time
from typing import Any

from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, ViewPlan
from polysense.data import source
from polysense.mechanisms.freeze import Freeze
from polysense.nn.head import LinearBias
from polysense.proofs.arms import accuracy, few_of_each, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.small import of_classes
from polysense.systems.adapt.freeze_tuning import HALF, FreezeTuning, planned
from polysense.systems.backbone.vit import tower

BEFORE, STEPS, RATE = 800, 400, 2e-3
METRIC, HIGHER_IS_BETTER = "accuracy on the digits from five to nine after 1,000 labels, the last two of four blocks trained", True
DATA = "mnist (15,000 digits from zero to four before; 200 labels a class from five to nine; 2,000 of the test split)"
PLANS = {"head alone": Freeze(train="head.*"), "last 1": Freeze(last=1, train="head.* *.norm.*"), "last 2": Freeze(last=2, train="head.* *.norm.*"),
         "norms alone": Freeze(train="norms head.*"), "everything": Freeze(train="*")}


def preset(classes: int, steps: int, lr: float) -> Preset:
    return Preset(
        data="", config=FreezeTuning.Config(backbone=tower(32, 8, 96, 4, 3), head=LinearBias.Config(into=96, out=classes)),
        feed=Feed(image=ImagePlan(size=32, mean=HALF, std=HALF), train_image=ViewPlan(size=32, scale=(0.8, 1.0))),
        stages=(Stage(objective=FreezeTuning.losses, steps=steps, batch_size=64, optim=Optim(lr=lr, weight_decay=0.05, warmup=20, clip=1.0)),))


def run(seed: int, split: str = "test") -> Outcome:
    low, high = (of_classes(source("mnist"), range(k, k + 5)) for k in (0, 5))
    known, learn = some_of(low, 15_000, seed), few_of_each(high, 200, seed)
    before = train_arm("freeze_tuning", preset(10, BEFORE, 2e-3), known, needs=("image", "label"), seed=seed).subject.system
    test = some_of(of_classes(source("mnist", split), range(5, 10)), 2000, 1)
    scores, notes = dict[str, float](), dict[str, Any]()

    def carry(system: Any) -> None:
        system.backbone.load_state_dict(before.backbone.state_dict())

    for name, plan in PLANS.items():
        begun = time.perf_counter()
        made = planned(preset(10, STEPS, RATE), plan)
        arm = train_arm("freeze_tuning", made, learn, needs=("image", "label"), seed=seed, prepare=carry)
        notes[f"seconds, {name}"] = round(time.perf_counter() - begun, 1)
        scores[name] = accuracy(arm.subject, test)
        own = sum(p.numel() for p in arm.subject.system.parameters() if p.requires_grad)
        notes[f"trained share, {name}"] = own / sum(p.numel() for p in arm.subject.system.parameters())
    most = scores["head alone"] + 0.9 * (scores["everything"] - scores["head alone"])
    return Outcome(scores["last 2"], {"the head alone and nine tenths of the gain": most}, notes | {f"accuracy, {k}": v for k, v in scores.items()})
