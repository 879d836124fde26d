"""Probes tell encoders apart: on drawn shapes a linear layer and the neighbours find far more in SimCLR's features than in the same tower untrained.

All probes are one exam on features computed once. Noted beside it: the neighbours, trained and untrained, the attentive probe and one shot; and for a
masked model, whose patches are better than its mean feature, what it is good for: its error at hidden patches against the mean of the visible
ones, and the accuracy after fine-tuning on few labels from its weights and from scratch, at equal steps, mean of two draws of the labels. Sizes
are a first guess.
"""
from statistics import fmean

from polysense.base.system import Preset, Start, System
from polysense.data import source
from polysense.data.sources import Source, Subset
from polysense.proofs.arms import Arm, accuracy, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.mae import digit, errors
from polysense.proofs.pool import kept, large
from polysense.proofs.simclr import BATCH, SCENES, small
from polysense.systems.selfsup import probes
from polysense.tasks import take
from polysense.train.starts import carry

STEPS, LABELS = 500, 200
METRIC = f"accuracy of the linear probe on SimCLR's features, eight drawn shapes of 32 px, {STEPS} steps of {BATCH}, 500 labels"
HIGHER_IS_BETTER = True
DATA = "scenes:single, the large things of 4,000 scenes without labels (labels of 500) and of 1,500 unseen"


def tuning(mae: Preset, classes: int) -> Preset:
    """The protocol `finetune` on this encoder."""
    base = probes.tiny().but(starts=(), feed=mae.feed, **{"config.backbone": mae.config.encoder, "config.mix.classes": classes})  # type: ignore[attr-defined]
    return probes.finetune(base).but(**{"stages.0.steps": 60, "stages.0.batch_size": 32, "stages.0.optim.warmup": 6,
                                        "config.backbone.body.drop_path": 0.0})


def tuned(plan: Preset, mae: Arm | None, few: Source, test: Source, seed: int) -> float:
    def stand(system: System) -> None:
        if mae is not None:
            carry(Start(into="backbone", from_="mae", take="encoder"), mae.subject, system)  # type: ignore[arg-type]
    return accuracy(train_arm("probes", plan, few, needs=("image", "label"), seed=seed, prepare=stand).subject, test)


def run(seed: int, split: str = "test") -> Outcome:
    train, test = kept(large(source(f"{SCENES}&n=4000&seed={seed}"))), kept(large(source(f"{SCENES}&n=1500", split=split)))
    contrast = train_arm("simclr", small().but(**{"stages.0.steps": STEPS}), train, needs=("views",), seed=seed)
    exam = take("probes", contrast.subject, test, Subset(train, range(500)), shots=(1,), steps=60, seed=seed)
    found = {name: m.value for name, m in exam.metrics.items()}
    masked = train_arm("mae", digit(STEPS), train, needs=("image",), seed=seed)
    drawn, fine = errors(masked, test), tuning(masked.subject.preset, len(train.classes))
    after, alone = (fmean(tuned(fine, arm, some_of(train, LABELS, s), test, s) for s in (seed, seed + 1)) for arm in (masked, None))
    return Outcome(found["linear"], {"the same tower untrained": found["untrained_linear"]}, {
        "20 neighbours": found["knn_20"], "20 neighbours, untrained": found["untrained_knn_20"], "attentive": found["attentive"],
        "one shot": found["accuracy_1_shot"], "masked error of MAE": drawn["MAE"],
        "masked error of the mean of the visible patches": drawn["mean of the visible patches"],
        f"{LABELS} labels, after MAE": after, f"{LABELS} labels, from scratch": alone})
