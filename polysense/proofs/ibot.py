"""iBOT's features of handwriting, learned without labels by a small vision transformer: neighbours on its class token, and what a linear layer reads
off one patch, against the same tower untrained.

The patch exam asks of single patches which digit they are a part of: a patch knows that only by what it has heard from the others. An iBOT that hides
nothing (DINO with the same budget) is reported beside it and decides nothing. The score is taken on pictures that no choice was made on.

As filed, it misses: the class token of a transformer this small, after so few steps, is told apart less well than a random one's. The loss between
views hardly leaves that of answers that are all alike, with and without hidden patches; DINOv2's term that spreads features mends it.
"""
from typing import Any

import torch

from polysense.base.system import Preset
from polysense.data.sources import Source
from polysense.proofs.arms import Arm, exam, read_all, train_arm
from polysense.proofs.distilled import handwriting, small
from polysense.proofs.harness import Outcome
from polysense.systems.selfsup import ibot
from polysense.tasks.encode import Features
from polysense.train.run import override

METRIC, HIGHER_IS_BETTER = "accuracy of 20 nearest neighbours on the teacher's class token, mnist, 300 steps of 64", True
DATA = "mnist (3,000 pictures without labels; their labels for the neighbours; 1,000 unseen)"


def of_patches(system: Any, of: Source, image: torch.Tensor, label: torch.Tensor) -> Any:
    """Two patches from the middle of each picture."""
    with torch.inference_mode():
        place = torch.cat([system.tower.dense(x).flatten(1, 2) for x in image.split(250)])
    middle = place.shape[1] // 2
    rows = torch.nn.functional.normalize(place[:, [middle - 2, middle + 1]].flatten(0, 1), dim=-1)
    return Features(of.name, tuple(of.offers), tuple(of.classes), rows, label.repeat_interleave(2).numpy(), [[] for _ in rows])


def run(seed: int, part: str = "test") -> Outcome:
    (train, test), plan = handwriting(seed, part), small(ibot)

    def arm(preset: Preset) -> Arm:
        return train_arm("ibot", preset, train, needs=("views", "crops"), seed=seed)

    arms = {"iBOT": arm(plan), "untrained": arm(plan.but(stages=())), "nothing hidden": arm(override(plan, {"masking": "none"}))}
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    read = [(s, *read_all(plan.feed, s)) for s in (test, train)]
    patches = {name: exam("linear_probe", a.subject, of_patches(a.subject.system, *read[0]), "accuracy",
                          train=of_patches(a.subject.system, *read[1])) for name, a in arms.items()}
    return Outcome(score["iBOT"], {"untrained": score["untrained"]}, {
        "20 neighbours, nothing hidden": score["nothing hidden"], **{f"linear probe of single patches, {k}": v for k, v in patches.items()},
        **{f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses}})
