"""The upper half of a transformer's blocks is most of what full tuning gains over a new head alone.

A ViT of four blocks that learned to read digits in drawn scenes is carried to handwritten ones with 1,000 labels: the head alone, the last block, the
last two, norms alone, everything; for as many steps. Tried once on validation pictures, the last two blocks regain less than is asked.
"""
import time
from typing import Any

from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, ViewPlan
from polysense.data import source
from polysense.mechanisms.freeze import Freeze
from polysense.nn.head import LinearBias
from polysense.proofs.arms import accuracy, few_of_each, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.adapt.freeze_tuning import HALF, FreezeTuning, planned
from polysense.systems.backbone.vit import tower

BEFORE, STEPS, RATE = 800, 400, 2e-3
METRIC, HIGHER_IS_BETTER = "accuracy on handwritten digits after 1,000 labels, the last two of four blocks trained", True
DATA = "scenes:digits (pre-training), mnist (100 labels a class; 2,000 of the test split)"
PLANS = {"head alone": Freeze(train="head.*"), "last 1": Freeze(last=1, train="head.* *.norm.*"), "last 2": Freeze(last=2, train="head.* *.norm.*"),
         "norms alone": Freeze(train="norms head.*"), "everything": Freeze(train="*")}


def preset(classes: int, steps: int, lr: float) -> Preset:
    return Preset(
        data="", config=FreezeTuning.Config(backbone=tower(32, 8, 96, 4, 3), head=LinearBias.Config(into=96, out=classes)),
        feed=Feed(image=ImagePlan(size=32, mean=HALF, std=HALF), train_image=ViewPlan(size=32, scale=(0.8, 1.0))),
        stages=(Stage(objective=FreezeTuning.losses, steps=steps, batch_size=64, optim=Optim(lr=lr, weight_decay=0.05, warmup=20, clip=1.0)),))


def run(seed: int, split: str = "test") -> Outcome:
    drawn = source(f"scenes:digits?n=6000&size=32&seed={seed}")
    before = train_arm("freeze_tuning", preset(len(drawn.classes), BEFORE, 2e-3), drawn, needs=("image", "label"), seed=seed).subject.system
    learn, test = few_of_each(source("mnist"), 100, seed), some_of(source("mnist", split), 2000, 1)
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
