"""A small ViT reads handwriting, needs to know where its patches stand, and gains from pre-training when labels are few.

Steps and rate were chosen on the first 2,000 test pictures of a fixed shuffle; the score is taken on the others, never looked at before.
"""
from polysense.base.system import Preset, System
from polysense.data import source
from polysense.nn.head import LinearBias
from polysense.proofs.arms import accuracy, rest_of, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import vit

METRIC, HIGHER_IS_BETTER = "mnist accuracy, ViT 4x96 of patch 4 at 28 px, 600 steps of 64", True
DATA = "mnist (30,000 train, 2,000 test); scenes:single (8,000) before 500 labels of mnist"
NEEDS = ("image", "label")


def small(steps: int, classes: int = 10, frozen: tuple[str, ...] = ("*",)) -> Preset:
    base = vit.tiny()
    return base.but(config=base.config.but(backbone=vit.tower(28, 4, 96, 4, 3), head=LinearBias.Config(into=96, out=classes))).but(
        **{"feed.image.size": 28, "feed.train_image.size": 28, "feed.train_image.scale": (0.9, 1.0), "stages.0.steps": steps,
           "stages.0.batch_size": 64, "stages.0.optim.lr": 2e-3,
           "stages.0.trainable": frozen})


def without_positions(system: System) -> None:
    system.backbone.position.data.zero_()  # type: ignore[operator, union-attr]


def run(seed: int) -> Outcome:
    train, test = source("mnist"), rest_of(source("mnist", split="test"), 2000, 0)
    whole = accuracy(train_arm("vit", small(600), train, needs=NEEDS, seed=seed).subject, test)
    still = ("backbone.cls", "backbone.patch.*", "backbone.body.*", "head.*")                    # positions stay at zero
    placeless = accuracy(train_arm("vit", small(600, frozen=still), train, needs=NEEDS, seed=seed, prepare=without_positions).subject, test)
    shapes = source(f"scenes:single?n=8000&seed={seed}")
    taught = train_arm("vit", small(400, classes=len(shapes.classes)), shapes, needs=NEEDS, seed=seed).subject.system.backbone.state_dict()
    few = some_of(train, 500, seed)
    fine = accuracy(train_arm("vit", small(200), few, needs=NEEDS, seed=seed, prepare=lambda s: s.backbone.load_state_dict(taught)).subject, test)
    fresh = accuracy(train_arm("vit", small(200), few, needs=NEEDS, seed=seed).subject, test)
    return Outcome(whole, {"0.84": 0.84, "without position embeddings": placeless}, {
        "500 labels, after scenes": fine, "500 labels, from scratch": fresh, "pre-training helps": fine > fresh})
