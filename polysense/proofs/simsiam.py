"""SimSiam's features of drawn shapes, learned without labels and without negatives, beat those of the untrained tower, and those of a SimSiam without
its stop-gradient, which finds the best loss of all and learns nothing.

The untrained tower, and it alone, reads twice: as it is born, and with the statistics of its norms measured on the training pictures, which is all
that a collapsed run has learned. Data, steps and rate were chosen with another seed on other scenes. The spread of the projections of unseen pictures
is reported: 1 for directions all over the sphere, 0 for one.
"""
from copy import deepcopy

import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.objectives.health import effective_rank, feature_spread
from polysense.proofs.arms import Arm, exam, read_all, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.pool import kept, large
from polysense.proofs.simclr import SCENES, TOWER
from polysense.systems.selfsup import simsiam
from polysense.train.run import override

STEPS, BATCH, RATE = 600, 128, 0.06
METRIC, HIGHER_IS_BETTER = f"accuracy of 20 nearest neighbours on SimSiam's features, eight white shapes of 32 px, {STEPS} steps of {BATCH}", True
DATA = "scenes:single, the large things of 4,000 white scenes without labels (their labels for the neighbours) and of 1,500 unseen"
WHITE = f"{SCENES}&colours=white"


def small() -> Preset:
    return simsiam.tiny().but(**{"config.backbone": TOWER, "stages.0.steps": STEPS, "stages.0.batch_size": BATCH, "stages.0.optim.lr": RATE})


def measured(of: Arm, image: torch.Tensor) -> Arm:
    """A copy whose norms know the mean and the variance of these pictures' features."""
    twin = deepcopy(of)
    for norm in (m for m in twin.subject.system.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)):
        norm.momentum = None                                     # the plain mean over what is read
        norm.reset_running_stats()
    with torch.no_grad():
        twin.subject.system.train().project(image)  # type: ignore[operator]
    twin.subject.system.eval()
    return twin


def run(seed: int, split: str = "test") -> Outcome:
    train, test = kept(large(source(f"{WHITE}&n=4000&seed={seed}"))), kept(large(source(f"{WHITE}&n=1500", split=split)))

    def arm(preset: Preset) -> Arm:
        return train_arm("simsiam", preset, train, needs=("views",), seed=seed)

    arms = {"SimSiam": arm(small()), "untrained": arm(small().but(stages=())),
            "without the stop-gradient": arm(override(small(), {"stop_gradient": "off"}))}
    arms["untrained, norms measured"] = measured(arms["untrained"], read_all(small().feed, train)[0][:1000])
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    notes = {f"linear probe, {name}": exam("linear_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    image = read_all(small().feed, test)[0][:500]
    with torch.inference_mode():
        seen = {name: a.subject.system.project(image) for name, a in arms.items()}
    notes |= {f"spread of the projections, {name}": float(feature_spread(x)) for name, x in seen.items()}
    notes |= {f"effective rank of the projections, {name}": float(effective_rank(x)) for name, x in seen.items()}
    return Outcome(score.pop("SimSiam"), score, notes | {f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses})
