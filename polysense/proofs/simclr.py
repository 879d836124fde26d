"""SimCLR's features of drawn shapes, learned without labels, beat those of the untrained tower, the pixels themselves, and a SimCLR whose views
differ in the crop alone: there the colours of two crops tell which picture they are of, and the shape is not looked at.

Data, steps, temperature and rate were chosen with another seed and other scenes. What the head puts out (z) is examined beside what transfer
reads (h).
"""
from typing import Any

import torch
import torch.nn.functional as F

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import Source
from polysense.nn.residual import Basic, Stem
from polysense.proofs.arms import Arm, exam, read_all, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.pool import kept, large
from polysense.systems.selfsup import simclr
from polysense.tasks.encode import Features
from polysense.towers.resnet import ResNet
from polysense.train.run import override

STEPS, BATCH, RATE = 1000, 128, 2e-3
TOWER = ResNet.Config(layers=(1, 1, 1), base=24, stem=Stem.Config(kernel=3, stride=2, pool=3), block=Basic.Config())     # small maps: more steps
METRIC = f"accuracy of 20 nearest neighbours on SimCLR's features, eight drawn shapes of 32 px, {STEPS} steps of {BATCH}"
HIGHER_IS_BETTER = True
DATA = "scenes:single, the large things of 4,000 scenes without labels (their labels for the neighbours) and of 1,500 unseen"
SCENES = "scenes:single?size=32&style=plain&shapes=circle,square,triangle,star,heart,cross,ring,arrow"


def small() -> Preset:
    return simclr.tiny().but(**{"config.backbone": TOWER, "stages.0.steps": STEPS, "stages.0.batch_size": BATCH, "stages.0.optim.lr": RATE})


def features(of: Source, rows: torch.Tensor, labels: torch.Tensor) -> Any:
    return Features(of.name, tuple(of.offers), tuple(of.classes), F.normalize(rows.flatten(1), dim=-1), labels.numpy(), [[] for _ in labels])


def run(seed: int, split: str = "test") -> Outcome:
    train, test = kept(large(source(f"{SCENES}&n=4000&seed={seed}"))), kept(large(source(f"{SCENES}&n=1500", split=split)))

    def arm(preset: Preset) -> Arm:
        return train_arm("simclr", preset, train, needs=("views",), seed=seed)

    arms = {"SimCLR": arm(small()), "untrained": arm(small().but(stages=())),
            "views differ in the crop alone": arm(override(small(), {"augment": "crop"}))}
    score = {name: exam("knn_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    (learn, y), (asked, label) = (read_all(small().feed, s) for s in (train, test))
    subject: Any = arms["SimCLR"].subject
    score["pixels"] = exam("knn_probe", subject, features(test, asked, label), "accuracy", train=features(train, learn, y))
    with torch.inference_mode():
        z = [torch.cat([subject.system.project(x) for x in images.split(250)]) for images in (learn, asked)]
    notes = {f"linear probe, {name}": exam("linear_probe", a.subject, test, "accuracy", train=train) for name, a in arms.items()}
    return Outcome(score.pop("SimCLR"), score, notes | {
        "20 neighbours on z": exam("knn_probe", subject, features(test, z[1], label), "accuracy", train=features(train, z[0], y)),
        **{f"final loss, {name}": a.final_loss for name, a in arms.items() if a.losses}})
