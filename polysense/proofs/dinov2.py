"""DINOv2's features of handwriting, learned without labels by a small vision transformer, beat those of the same tower untrained; beside it stand a
DINOv2 without KoLeo (how near is the nearest neighbour?) and one with a running centre in place of Sinkhorn (how many prototypes are used?).

The score is taken on pictures that no choice was made on.
"""
from typing import Any

import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.objectives.codes import perplexity
from polysense.proofs.arms import Arm, exam, read_all, rest_of, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.selfsup import dinov2
from polysense.tasks.probes import diagnosis
from polysense.train.run import override

METRIC, HIGHER_IS_BETTER = "accuracy of 20 nearest neighbours on the teacher's class token, mnist, 300 steps of 64", True
DATA = "mnist (3,000 pictures without labels; their labels for the neighbours; 1,000 unseen)"


def small() -> Preset:
    feed: Any = dinov2.tiny().feed
    view, crop = feed.views[0].but(flip=0.0), feed.crops[0].but(flip=0.0, scale=(0.2, 0.5))           # a mirrored digit is another
    return dinov2.tiny().but(**{
        "feed.views": (view, view), "feed.crops": (crop,) * 2, "config.backbone.patch": 8, "config.backbone.body.depth": 3,
        "config.sampler.blocks.least": 1, "config.teacher.momentum": 0.97, "config.warming": 1.0, "config.still": 0.0,
        "stages.0.steps": 300, "stages.0.optim.warmup": 30, "stages.0.optim.lr": 2e-3, "stages.0.optim.final_decay": 0.04})


def run(seed: int, part: str = "test") -> Outcome:
    held = source("mnist", split="test")
    train, test = some_of(source("mnist"), 3000, seed), some_of(held, 1000, 0) if part == "dev" else some_of(rest_of(held, 2000, 0), 1000, 0)

    def arm(preset: Preset) -> Arm:
        return train_arm("dinov2", preset, train, needs=("views", "crops"), seed=seed)

    arms = {"DINOv2": arm(small()), "untrained": arm(small().but(stages=())), "without KoLeo": arm(small().but(**{"config.koleo": 0.0})),
            "a running centre": arm(override(small(), {"centre": "mean"}))}
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    image, notes = read_all(small().feed, test)[0][:500], {}
    for name, a in arms.items():
        system = a.subject.system
        with torch.inference_mode():
            notes[f"distance to the nearest neighbour, {name}"] = diagnosis(system.encode_image(image))["nearest_distance"]
            held_ = system.teacher.module
            notes[f"prototypes used, {name}"] = float(perplexity((held_["projector"](held_["backbone"].pooled(image)) / 0.07).softmax(-1).mean(0)))
    notes |= {f"20 neighbours, {name}": score[name] for name in ("without KoLeo", "a running centre")}
    return Outcome(score["DINOv2"], {"untrained": score["untrained"]},
                   notes | {f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses})
