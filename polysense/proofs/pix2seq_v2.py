"""One set of weights for boxes, outlines and captions: sequence augmentation earns its place, and sharing costs little.

The system for detection alone takes as many steps as the one for all tasks. Sizes were set by time alone, before any score was seen: a
decoder of half the width, 32 bins, plain scenes of one or two things.

As filed, it missed: no arm finds anything in so little time, so the comparison says nothing about sequence augmentation. A
decoder that writes coordinates learns them late; the budget, not the method, is what was measured.
"""
from typing import Any

import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.loader import Loader
from polysense.nn.coords import CAPTION, Vocabulary
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.prompt import pix2seq_v2
from polysense.tasks import take
from polysense.tasks.encode import frozen

METRIC, HIGHER_IS_BETTER = "AP50 of boxes, one of four tasks of one system, scenes of 1-2 things at 64 px", True
DATA = "scenes (3,000 train, 150 test; four plain shapes)"
SCENES = "shapes=circle,square,triangle,star&style=plain&digits=0&objects=1-2"
NEEDS = ("image", "boxes", "box_label", "polygon", "keypoints", "text")
STEPS, BATCH, MARGIN = 300, 24, 0.1
TASKS = ("detect", "segment", "keypoints", "caption")


def preset(fill: str = "noise", only: str = "") -> Preset:
    weights = tuple((t, 0.0) for t in TASKS if only and t != only)
    v = Vocabulary(classes=pix2seq_v2.SHAPES, bins=32, bins_from=150, text_from=200, words=300)
    return pix2seq_v2.tiny().but(**{
        "config.fill": fill, "config.objects": 4, "config.vocabulary": v, "config.decoder": pix2seq_v2.decoder(v.size, 40, 64, 2, 4, 256),
        "config.points": 8, "config.instances": 1, "feed.text.vocab": 300, "feed.text.length": 24, "stages.0.weights": weights,
        "stages.0.steps": STEPS, "stages.0.batch_size": BATCH, "stages.0.optim.lr": 2e-3, "stages.0.optim.warmup": 20})


def outlines(subject: Any, test: Any) -> float:
    """Mean IoU of the mask drawn in each true box."""
    shared: list[torch.Tensor] = []
    with frozen(subject.system):
        for batch in Loader(test, subject.preset.feed, None, batch_size=25, train=False, needs=("image", "boxes", "box_label", "mask")):
            there = batch["box_label"] >= 0
            drawn = subject.system.segment(batch["image"], boxes=batch["boxes"].clamp(0, 1))[0][:, :, 0] > 0
            mask = batch["mask"][:, :, 1::2, 1::2]
            shared.append(((drawn & mask).flatten(2).sum(-1) / (drawn | mask).flatten(2).sum(-1).clamp(min=1))[there])
    return float(torch.cat(shared).mean())


def words(subject: Any, test: Any) -> float:
    """Share of the tokens of the true captions that are the likeliest ones, each after the true ones before it."""
    right = total = 0
    s = subject.system
    with frozen(s):
        for batch in Loader(test, subject.preset.feed, subject.tokenizer, batch_size=25, train=False, needs=("image", "text")):
            said, weight = s.sentence(batch["text"])
            prompt = torch.full((len(said), 1), CAPTION)
            hidden = s.decoder.read(s.decoder.embed(torch.cat([prompt, said[:, :-1]], 1)), source=s.look(batch["image"]))
            hit = s.decoder.logits(hidden).argmax(-1) == said
            right, total = right + int(hit[weight > 0].sum()), total + int((weight > 0).sum())
    return right / total


def compare(seed: int, train: str, test: str, split: str) -> dict[str, dict[str, float]]:
    learn, asked = source(train), source(test, split)
    arms = {"all tasks": preset(), "no sequence augmentation": preset(fill="end"), "detection alone": preset(only="detect")}
    table: dict[str, dict[str, float]] = {}
    for name, of in arms.items():
        subject = train_arm("pix2seq_v2", of, learn, needs=NEEDS, seed=seed).subject
        table[name] = {k: m.value for k, m in take("detection", subject, asked).metrics.items()}
        if name == "all tasks":
            table[name] |= {"mask IoU": outlines(subject, asked), "caption tokens": words(subject, asked)}
    return table


def run(seed: int) -> Outcome:
    table = compare(seed, f"scenes?n=3000&seed={seed}&{SCENES}", f"scenes?n=150&seed=700&{SCENES}", "test")
    both = table["all tasks"]
    alone = {"detection alone, less the margin": table["detection alone"]["ap50"] - MARGIN}
    return Outcome(both["ap50"], {"no sequence augmentation": table["no sequence augmentation"]["ap50"], **alone}, {"all": table, "margin": MARGIN})
