"""MoCo's features of shapes, learned without labels, beat those of the untrained tower and of a MoCo without its momentum.

Steps, rates and views were chosen with other seeds on training scenes; the scored scenes were not looked at. v3's form (keys of the batch) and
the head's own projection are reported and decide nothing.
"""
from polysense.base.system import Preset
from polysense.data import source
from polysense.nn.head import Projector
from polysense.proofs.arms import Arm, exam, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.selfsup import moco

METRIC, HIGHER_IS_BETTER = "accuracy of 20 nearest neighbours on MoCo's features, ten shapes, 300 steps of 128, queue of 2,048", True
DATA = "scenes:single (4,000 pictures without labels; their labels for the neighbours; 1,000 unseen)"


def small() -> Preset:
    return moco.tiny().but(**{"stages.0.steps": 300})


def batch_form() -> Preset:
    """v3's objective with the same tower, views and steps."""
    base = small()
    return base.but(
        config=base.config.but(queue=None, projector=Projector.Config(widths=(96, 96, 64), last="norm"),
                               predictor=Projector.Config(widths=(64, 96, 64), last="norm")),
        stages=(base.stages[0].but(objective=moco.MoCo.meet),))


def run(seed: int) -> Outcome:
    train, test = source(f"scenes:single?n=4000&seed={seed}"), source("scenes:single?n=1000&seed=900", split="test")

    def arm(preset: Preset) -> Arm:
        return train_arm("moco", preset, train, needs=("views",), seed=seed)

    arms = {"MoCo": arm(small()), "untrained": arm(small().but(stages=())),
            "keys of the live encoder (m = 0)": arm(small().but(**{"config.teacher.momentum": 0.0}))}
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    notes = {f"linear probe, {name}": exam("linear_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    notes["20 neighbours, keys of the batch (v3)"] = exam("knn_probe", arm(batch_form()).subject, test, "accuracy", train=train)
    return Outcome(score.pop("MoCo"), score, notes | {f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses})
