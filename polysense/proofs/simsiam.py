"""SimSiam's features of handwriting, learned without labels and without negatives, beat those of the untrained tower, and those of a SimSiam without
its stop-gradient, which finds the best loss of all and learns nothing.

Data, steps and rate were chosen with another seed on the first 2,000 test pictures of a fixed shuffle; the score is taken on others. The spread of
the projections of unseen pictures is reported: 1 for directions all over the sphere, 0 for one.
"""
import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.objectives.health import effective_rank, feature_spread
from polysense.proofs.arms import Arm, exam, read_all, rest_of, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.selfsup import simsiam
from polysense.train.run import override

METRIC, HIGHER_IS_BETTER = "accuracy of 20 nearest neighbours on SimSiam's features, mnist, 400 steps of 64", True
DATA = "mnist (4,000 pictures without labels; their labels for the neighbours; 2,000 unseen)"


def small() -> Preset:
    view = simsiam.tiny().feed.views[0].but(flip=0.0)             # a mirrored digit is another
    return simsiam.tiny().but(**{"feed.views": (view, view), "stages.0.steps": 400, "stages.0.batch_size": 64})


def run(seed: int, part: str = "test") -> Outcome:
    held = source("mnist", split="test")
    train, test = some_of(source("mnist"), 4000, seed), some_of(held, 2000, 0) if part == "dev" else some_of(rest_of(held, 2000, 0), 2000, 0)

    def arm(preset: Preset) -> Arm:
        return train_arm("simsiam", preset, train, needs=("views",), seed=seed)

    arms = {"SimSiam": arm(small()), "untrained": arm(small().but(stages=())),
            "without the stop-gradient": arm(override(small(), {"stop_gradient": "off"}))}
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    notes = {f"linear probe, {name}": exam("linear_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    image = read_all(small().feed, test)[0][:500]
    with torch.inference_mode():
        seen = {name: a.subject.system.project(image) for name, a in arms.items()}
    notes |= {f"spread of the projections, {name}": float(feature_spread(x)) for name, x in seen.items()}
    notes |= {f"effective rank of the projections, {name}": float(effective_rank(x)) for name, x in seen.items()}
    return Outcome(score.pop("SimSiam"), score, notes | {f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses})
