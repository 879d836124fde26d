"""Does masked autoencoding help contrast? The difference to CLIP at equal steps, on few and on more pairs.

What is claimed is what the authors found: the gain on few pairs is at least the gain on more of them. The score is the first, the baseline the
second; both are differences of the accuracy of a linear probe on the picture tower, and either may be negative. As filed, the interval of their
difference holds zero: these sizes do not tell the two apart.
"""
from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import Source
from polysense.proofs.arms import exam, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.small import LENGTH, SIZE, VOCAB, fitted
from polysense.systems.align import mae_clip

METRIC, HIGHER_IS_BETTER = "gain of MAE-CLIP over CLIP, linear probe on cifar10, trained on 400 pairs", True
DATA = "fashion_products (400 and 6,000 pairs), probed on cifar10 (2,000 train, 2,000 test)"
STEPS, FEW, MORE = 150, 400, 6000


def plan(pixels: float, words: float) -> Preset:
    config = mae_clip.config(SIZE, 8, (96, 3, 3), (96, 2, 3), (48, 1, 2), 96, VOCAB, LENGTH, 4, (0, 1, 2), pool="mean")
    return fitted(mae_clip.tiny(), config, STEPS, **{"stages.0.weights": mae_clip.weights_of(pixels, words), "stages.0.batch_size": 64,
                                                     "stages.0.optim.warmup": 15})


def run(seed: int, test: Source | None = None) -> Outcome:
    pairs, labelled = source("fashion_products"), some_of(source("cifar10"), 2000, seed)
    test, found = source("cifar10", split="test") if test is None else test, {}
    for n in (FEW, MORE):
        data = some_of(pairs, n, seed)
        for name, weights in (("CLIP", (0.0, 0.0)), ("MAE-CLIP", (0.5, 0.1))):
            subject = train_arm("mae_clip", plan(*weights), data, needs=("image", "text"), seed=seed).subject
            found[f"{name}, {n} pairs"] = exam("linear_probe", subject, test, "accuracy", train=labelled)
    gain = {n: found[f"MAE-CLIP, {n} pairs"] - found[f"CLIP, {n} pairs"] for n in (FEW, MORE)}
    return Outcome(gain[FEW], {f"gain on {MORE} pairs": gain[MORE]}, found)
