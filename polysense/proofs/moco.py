"""MoCo's features of handwriting, learned without labels, beat those of the untrained tower and of a MoCo without its momentum.

Data, steps and views were chosen with other seeds on the first 2,000 test pictures of a fixed shuffle (on scenes of many colours the queue
learns nothing within the budget); the score is taken on others, never looked at before. v3's form (keys of the batch) is reported and
decides nothing.
"""
from polysense.base.system import Preset
from polysense.data import source
from polysense.nn.head import Projector
from polysense.proofs.arms import Arm, exam, rest_of, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.selfsup import moco

METRIC, HIGHER_IS_BETTER = "accuracy of 20 nearest neighbours on MoCo's features, mnist, 300 steps of 64, queue of 1,024", True
DATA = "mnist (4,000 pictures without labels; their labels for the neighbours; 2,000 unseen)"


def small() -> Preset:
    view = moco.tiny().feed.views[0].but(flip=0.0)                # a mirrored digit is another
    return moco.tiny().but(**{"feed.views": (view, view), "stages.0.steps": 300, "stages.0.batch_size": 64, "config.queue.size": 1024})


def batch_form() -> Preset:
    """v3's objective with the same tower, views and steps."""
    base = small()
    return base.but(
        config=base.config.but(queue=None, projector=Projector.Config(widths=(96, 96, 64), last="norm"),
                               predictor=Projector.Config(widths=(64, 96, 64), last="norm")),
        stages=(base.stages[0].but(objective=moco.MoCo.meet),))


def run(seed: int) -> Outcome:
    train, test = some_of(source("mnist"), 4000, seed), some_of(rest_of(source("mnist", split="test"), 2000, 0), 2000, 0)

    def arm(preset: Preset) -> Arm:
        return train_arm("moco", preset, train, needs=("views",), seed=seed)

    arms = {"MoCo": arm(small()), "untrained": arm(small().but(stages=())),
            "keys of the live encoder (m = 0)": arm(small().but(**{"config.teacher.momentum": 0.0}))}
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    notes = {f"linear probe, {name}": exam("linear_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    notes["20 neighbours, keys of the batch (v3)"] = exam("knn_probe", arm(batch_form()).subject, test, "accuracy", train=train)
    return Outcome(score.pop("MoCo"), score, notes | {f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses})
