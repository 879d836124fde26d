"""Writing down what is left of what teaches a picture tower where things are.

Scenes of two things are told as "a red star left of a blue cross". After equal steps a linear probe asks the frozen towers for the shape of the
thing on the left. CapPa is compared with CLIP on the same tower, data and steps; Cap stands beside it, and how well CapPa ranks names of the left
thing. As filed, captions and contrast are level: in so few steps neither tower has learned much of the small shapes.
"""
from typing import Any

import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.scenes.source import ScenesSource
from polysense.data.sources import ListSource
from polysense.proofs.arms import exam, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.small import LENGTH, SIZE, VOCAB, fitted
from polysense.systems.align import cappa, clip
from polysense.towers.clip import body, vit_pair
from polysense.towers.shapes import plain_vit

METRIC, HIGHER_IS_BETTER = "linear-probe accuracy: the shape of the thing on the left", True
DATA = "scenes of two things of four colours and shapes (3,000 told; probed on 1,000, tested on 500 others)"
STEPS, COLOURS, SHAPES = 200, ("red", "blue", "green", "yellow"), ("circle", "square", "star", "cross")
SPEC = f"scenes?objects=2&digits=0&style=plain&shapes={','.join(SHAPES)}&colours={','.join(COLOURS)}"


def told(n: int, seed: int, split: str = "train") -> ListSource:
    base, rows = source(f"{SPEC}&n={n}&seed={seed}&size={SIZE}", split=split), []
    assert isinstance(base, ScenesSource)
    for i in range(n):
        if len(things := base.scene(i).things) != 2:     # the second found no room
            continue
        left, right = sorted(things, key=lambda t: t.x)
        rows.append({"id": i, "image": base.load(i, "image"), "label": SHAPES.index(left.shape), "left": f"a {left.colour} {left.shape}",
                     "captions": [f"a {left.colour} {left.shape} left of a {right.colour} {right.shape}"]})
    return ListSource("told scenes", rows, ("image", "text", "label"), split=split, classes=SHAPES, largest=SIZE)


def plan(parallel: float) -> Preset:
    return fitted(cappa.tiny(), cappa.config(SIZE, 8, (96, 3, 3), (96, 2, 3), VOCAB, LENGTH, parallel), STEPS, **{"stages.0.batch_size": 96})


def run(seed: int, test_seed: int = 1001) -> Outcome:
    train, few, test = told(3000, seed), told(1000, seed + 500), told(500, test_seed, "test")
    tower: dict[str, Any] = {"vision": plain_vit(SIZE, 8, 96, 3, 3, prefix=0, pool="mean")}
    towers: dict[str, Any] = vit_pair(SIZE, 8, body(96, 3, 3), body(96, 2, 3), 96, vocab=VOCAB, length=LENGTH, end=2) | tower
    contrast = fitted(clip.tiny(), clip.CLIP.Config(**towers), STEPS, **{
        "stages.0.batch_size": 96, "feed.train_image": plan(0.0).feed.train_image, "feed.text": plan(0.0).feed.text})
    tokenizer, found, notes = words(plan(0.0), train), {}, {}
    for name, id_, of in (("CapPa", "cappa", plan(0.75)), ("Cap", "cappa", plan(0.0)), ("CLIP", "clip", contrast)):
        subject = train_arm(id_, of, train, needs=("image", "text"), seed=seed, tokenizer=tokenizer).subject
        found[name] = exam("linear_probe", subject, test, "accuracy", train=few)
        if name == "CapPa":
            names = [f"a {c} {s}" for c in COLOURS for s in SHAPES]
            ids = tokenizer([f"{n} left" for n in names])[:, :-1]                # no end: the caption goes on
            with torch.inference_mode():
                best = torch.cat([subject.system.score_text(subject.read_images([test.load(i, "image")]), ids).argmax(1) for i in range(200)])
            right = sum(names[b] == test.samples[i]["left"] for i, b in enumerate(best.tolist()))
            notes["names of the left thing ranked right, chance 1/16"] = right / 200
    return Outcome(found["CapPa"], {"CLIP, same tower and steps": found["CLIP"]}, {"Cap": found["Cap"], **notes, "chance": 0.25})
