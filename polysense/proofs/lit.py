"""A locked, label-trained image tower lends its sight to a new text tower.

Lu (locked, its features computed once) and uu (everything from scratch) train on the same pairs for the same wall-clock time, then both
name pairs of colour and shape that no caption joined. Pre-training the locked tower is not counted: it is what one already has.

Candidates and time were chosen on other test pictures (of seed 0: among all 180 names, 40 s gave 0.001); the score is taken on pictures of
another seed, never looked at before.
"""
import time
from collections.abc import Iterator

import torch

from polysense.base.batch import Batch
from polysense.base.system import System
from polysense.data import source
from polysense.data.loader import Loader
from polysense.proofs.arms import Present, exam, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.systems.align import lit
from polysense.systems.backbone import supervised

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy among the names of 36 unseen pairs of colour and shape", True
DATA = "scenes:combos (6,000 pairs; tested on the held-out combinations)"
SECONDS = 60.0


def cached(features: torch.Tensor, texts: list[list[str]], tokenizer: object, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of cached features and a random caption of each picture."""
    g = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(features), generator=g).split(batch_size):
            if len(rows) == batch_size:
                pick = torch.rand(batch_size, generator=g)
                said = [texts[i][int(p * len(texts[i]))] for i, p in zip(rows.tolist(), pick.tolist(), strict=True)]
                yield {"features": features[rows], "text": tokenizer(said)}  # type: ignore[operator]


def run(seed: int) -> Outcome:
    train, unseen = source(f"scenes:combos?n=6000&seed={seed}"), Present(source("scenes:combos?n=1000&seed=1001", split="test"))
    teacher = train_arm("supervised", supervised.tiny(), train, needs=("image", "label"), seed=seed).subject.system

    def lock(system: System) -> None:
        system.vision.load_state_dict(teacher.backbone.state_dict())  # type: ignore[operator, union-attr]

    plan, tokenizer = lit.tiny().but(**{"stages.0.steps": 100_000}), words(lit.tiny(), train)
    texts = [train.about(i)["captions"] for i in range(len(train))]

    def spent(since: float) -> float:
        return min(1.0, (time.perf_counter() - since) / SECONDS)

    start = time.perf_counter()                                   # the features are computed inside Lu's time
    with torch.inference_mode():
        features = torch.cat([teacher.backbone.pooled(b["image"]) for b in Loader(
            train, plan.feed, None, batch_size=250, train=False, needs=("image",))]).clone()
    locked = train_arm("lit", plan, train, needs=("text",), seed=seed, tokenizer=tokenizer, prepare=lock, clock=lambda: spent(start),
                       batches=cached(features, texts, tokenizer, plan.stages[0].batch_size, seed))
    start = time.perf_counter()
    scratch = train_arm("lit", lit.tiny_uu().but(**{"stages.0.steps": 100_000}), train, needs=("image", "text"), seed=seed, tokenizer=tokenizer,
                        clock=lambda: spent(start))
    same = all(torch.equal(v, teacher.backbone.state_dict()[k]) for k, v in locked.subject.system.vision.state_dict().items())
    named = {k: exam("zero_shot", arm.subject, unseen, "accuracy") for k, arm in (("Lu", locked), ("uu", scratch))}
    return Outcome(named["Lu"], {"uu, equal time": named["uu"]}, {
        "steps Lu": len(locked.losses), "steps uu": len(scratch.losses), "locked tower unchanged": same, "chance": 1 / len(unseen.classes)})
