"""One model does both jobs: it writes exact captions, and finds by text about as well as one that was trained to do nothing else.

Scenes of one large thing are told as "a red star"; a caption counts if colour and shape are right. The bar is four captions in five, and the same
model with its picture blanked, which can only say what is common. Beside it: naming pictures among all captions (R@1, image to text) by CoCa, by
the contrastive loss alone and by the caption loss alone, each at equal steps, and what the caption loss alone writes. As filed, it stays below that
bar in the steps that a proof has, and well above what a blanked picture gives.
"""
from typing import Any

import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.scenes.source import ScenesSource
from polysense.data.sources import ListSource
from polysense.proofs.arms import train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.pool import batches, drawn_once
from polysense.proofs.small import SIZE, fitted
from polysense.systems.align import coca
from polysense.towers.shapes import plain_vit

METRIC, HIGHER_IS_BETTER = "share of captions with the right colour and shape", True
DATA = "scenes of one large thing of four colours and shapes (3,000 told, 400 others tested)"
STEPS, VOCAB, LENGTH, NEEDS = 900, 200, 12, ("image", "text")
COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "star", "cross")
SPEC = f"scenes?objects=1&digits=0&style=plain&shapes={','.join(SHAPES)}&colours={','.join(COLOURS)}"
TEXTS = [f"a {c} {s}" for c in COLOURS for s in SHAPES]


def told(n: int, seed: int, split: str = "train") -> ListSource:
    """n scenes whose thing is large: a small one is four pixels wide here."""
    base, rows = source(f"{SPEC}&n={4 * n}&seed={seed}&size={SIZE}", split=split), []
    assert isinstance(base, ScenesSource)
    for i in range(len(base)):
        thing = base.scene(i).things[0]
        if thing.size == "large" and len(rows) < n:
            said = f"a {thing.colour} {thing.shape}"
            rows.append({"id": i, "image": base.load(i, "image"), "captions": [said], "label": TEXTS.index(said)})
    return ListSource("told things", rows, ("image", "text", "label"), split=split, classes=TEXTS, largest=SIZE)


def plan(**weights: float) -> Preset:
    arm = fitted(coca.tiny(), coca.config(plain_vit(SIZE, 8, 96, 3, 3), (96, 2, 3), 8, VOCAB, LENGTH), STEPS, **{
        "stages.0.batch_size": 64, "feed.told": (), "feed.text.vocab": VOCAB, "feed.text.length": LENGTH})
    return arm.but(**{"stages.0.weights": tuple((dict(coca.WEIGHTS) | weights).items())})


def judged(subject: Any, test: ListSource) -> dict[str, float]:
    """Exact captions, the same of blanked pictures, and R@1 among all texts."""
    system, right, blank, named = subject.system, 0, 0, 0
    rows, start = subject.tokenizer(TEXTS), torch.tensor([[system.start]])
    with torch.inference_mode():
        texts = system.encode_text(rows)
        for batch in Loader(test, subject.preset.feed, subject.tokenizer, batch_size=200, train=False, needs=("image", "label")):
            image, truth = batch["image"], [TEXTS[i] for i in batch["label"].tolist()]
            for seen, blanked in ((image, False), (torch.zeros_like(image), True)):
                said = [subject.tokenizer.decode(t) for t in system.generate_text(seen, start.expand(len(seen), -1), max_new=6)]
                hit = sum(a == b for a, b in zip(said, truth, strict=True))
                right, blank = (right, blank + hit) if blanked else (right + hit, blank)
            named += int(((system.encode_image(image) @ texts.T).argmax(1) == batch["label"]).sum())
    return {"exact": right / len(test), "blanked": blank / len(test), "R@1": named / len(test)}


def run(seed: int, test_seed: int = 1001) -> Outcome:
    train, test = told(3000, seed), told(400, test_seed, "test")
    tokenizer, found = words(plan(), train), {}
    whole = drawn_once(train, plan().feed, tokenizer, NEEDS)
    for name, of in (("CoCa", plan()), ("contrast alone", plan(caption=0.0)), ("caption alone", plan(contrast=0.0))):
        subject = train_arm("coca", of, train, needs=NEEDS, seed=seed, tokenizer=tokenizer, batches=batches(whole, 64, seed)).subject
        found[name] = judged(subject, test)
    both = found["CoCa"]
    return Outcome(both["exact"], {"the entry's bar": 0.8, "the picture blanked": both["blanked"]}, {
        "R@1 among 16 texts, CoCa": both["R@1"], "R@1, contrast alone": found["contrast alone"]["R@1"],
        "R@1, caption alone": found["caption alone"]["R@1"], "exact, caption alone": found["caption alone"]["exact"], "chance": 1 / len(TEXTS)})
