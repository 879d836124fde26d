"""DINOv2's features of handwriting, learned without labels by a small vision transformer, beat those of the same tower untrained; beside it stand a
DINOv2 without KoLeo (how near is the nearest neighbour?) and one with a running centre in place of Sinkhorn (how many prototypes are used?).

The score is taken on pictures that no choice was made on.
"""

import torch

from polysense.base.system import Preset
from polysense.objectives.codes import perplexity
from polysense.proofs.arms import Arm, exam, read_all, train_arm
from polysense.proofs.distilled import handwriting, small
from polysense.proofs.harness import Outcome
from polysense.systems.selfsup import dinov2
from polysense.tasks.probes import diagnosis
from polysense.train.run import override

METRIC, HIGHER_IS_BETTER = "accuracy of 20 nearest neighbours on the teacher's class token, mnist, 300 steps of 64", True
DATA = "mnist (3,000 pictures without labels; their labels for the neighbours; 1,000 unseen)"


def run(seed: int, part: str = "test") -> Outcome:
    (train, test), plan = handwriting(seed, part), small(dinov2)

    def arm(preset: Preset) -> Arm:
        return train_arm("dinov2", preset, train, needs=("views", "crops"), seed=seed)

    arms = {"DINOv2": arm(plan), "untrained": arm(plan.but(stages=())), "without KoLeo": arm(plan.but(**{"config.koleo": 0.0})),
            "a running centre": arm(override(plan, {"centre": "mean"}))}
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    image, notes = read_all(plan.feed, test)[0][:500], {}
    for name, a in arms.items():
        system = a.subject.system
        with torch.inference_mode():
            notes[f"distance to the nearest neighbour, {name}"] = diagnosis(system.encode_image(image))["nearest_distance"]
            held_ = system.teacher.module
            notes[f"prototypes used, {name}"] = float(perplexity((held_["projector"](held_["backbone"].pooled(image)) / 0.07).softmax(-1).mean(0)))
    notes |= {f"20 neighbours, {name}": score[name] for name in ("without KoLeo", "a running centre")}
    return Outcome(score["DINOv2"], {"untrained": score["untrained"]},
                   notes | {f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses})
