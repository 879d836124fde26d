"""Clusters beside contrast: xCLIP names digits better than CLIP after the same steps, nCLIP alone makes features that its heads cannot name.

As filed, xCLIP is a little below CLIP after so few steps, in which the clusters are still forming; without the term that asks for all of them nCLIP
falls into one. All arms share towers, data order and steps. Beside the score: how many clusters are used, with and without the term that asks for
it, and the linear probes of the towers.
"""
import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Source
from polysense.proofs.arms import exam, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.small import digits, fitted, pair, reads_digits
from polysense.systems.align import nclip_xclip as recipe

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy on handwritten digits, xCLIP", True
DATA = "mnist (6,000 pictures with sentences; 2,000 for the test)"
STEPS, CLUSTERS = 250, 256


def plan(**weights: float) -> Preset:
    clusters = recipe.clusters(96, 192, CLUSTERS)
    return fitted(recipe.tiny(), recipe.XCLIP.Config(**pair(), image_clusters=clusters, text_clusters=clusters), STEPS, **{
        "stages.0.weights": tuple(weights.items()), "feed.train_image.flip": 0.0, "stages.0.optim.warmup": 15})


def used(subject: object, test: Source) -> int:
    """Clusters that at least one picture falls into."""
    system, chosen = subject.system, set[int]()  # type: ignore[attr-defined]
    with torch.inference_mode():
        for batch in Loader(test, subject.preset.feed, None, batch_size=250, train=False, needs=("image",)):  # type: ignore[attr-defined]
            chosen |= set(system.image_clusters(system.vision.pooled(batch["image"])).argmax(1).tolist())
    return len(chosen)


def run(seed: int, test: Source | None = None) -> Outcome:
    train, few = digits(6000, seed), some_of(source("mnist"), 1000, seed + 100)
    test = some_of(source("mnist", split="test"), 2000, 0) if test is None else test
    arms = {"xCLIP": recipe.weights_of(recipe.WEIGHT), "CLIP": recipe.weights_of(0.0), "nCLIP": recipe.weights_of(1.0, 0.0),
            "nCLIP, nothing asks for all clusters": (("contrast", 0.0), ("agree", 1.0), ("sure", recipe.SURE), ("used", 0.0))}
    score, notes = {}, {}
    for name, weights in arms.items():
        subject = train_arm("nclip_xclip", plan(**dict(weights)), train, needs=("image", "text"), seed=seed).subject
        score[name] = reads_digits(subject, test)
        notes[f"clusters used, {name}"] = used(subject, test)
        if "," not in name:
            notes[f"linear probe, {name}"] = exam("linear_probe", subject, test, "accuracy", train=few)
    return Outcome(score.pop("xCLIP"), {"CLIP at equal steps": score.pop("CLIP")}, {f"zero-shot, {k}": v for k, v in score.items()} | notes)
