"""Queries that were aligned first teach a frozen language model to see.

A small ViT is trained as CLIP's and frozen; a small language model reads captions without pictures and is frozen. BLIP-2 then runs both stages,
the control its second stage alone with as many steps. Each writes captions of new pictures; colour and shape of what is shown count one each
when the caption names them. The language model without a picture says what the words alone are worth. Trials were made on pictures of other
seeds.
"""
from functools import partial
from typing import Any

import torch

from polysense.base.system import Preset, System
from polysense.data import source
from polysense.data.sources import Source
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.align import clip
from polysense.systems.lmm import blip2
from polysense.towers.clip import body

METRIC, HIGHER_IS_BETTER = "attributes (colour, shape) that greedy captions name rightly, share", True
DATA = "scenes:combos (3,000 pairs; 500 new pictures)"
SEEING, READING, ALIGNING, SPEAKING = 130, 220, 120, 180       # steps: the ViT as CLIP's, the language model, stage 1, stage 2
NEEDS = ("image", "text")


def small(*stages: tuple[int, int]) -> Preset:
    """(which stage of tiny, steps) pairs over a ViT 4x128 of patch 16, 4 queries of width 96, a language model 2x96."""
    base = blip2.tiny()
    chosen = tuple(base.stages[i].but(steps=steps, **{"optim.warmup": 10}) for i, steps in stages)
    return base.but(starts=(), stages=chosen).but(**{
        "config.vision": seer().vision, "config.qformer.width": 96, "config.qformer.depth": 2, "config.qformer.queries": 4,
        "config.qformer.source": 128, "config.language.body.width": 96, "config.language.body.heads": 4,
        "config.language.body.block.mlp.hidden": 384})


def seer() -> Any:
    """A small CLIP."""
    return clip.config(64, 16, body(128, 4, 2), body(128, 2, 2), dim=128, vocab=4096, length=48, end=2)


def eye_of(train: Source, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a ViT trained as CLIP's."""
    preset = clip.tiny().but(config=seer()).but(**{"stages.0.steps": SEEING, "stages.0.batch_size": 64})
    return train_arm("clip", preset, train, needs=NEEDS, seed=seed).subject.system.vision.state_dict()


def load(weights: dict[str, torch.Tensor], system: System) -> None:
    """Puts in what there is; the rest stays as it is."""
    system.load_state_dict(weights, strict=False)


@torch.inference_mode()
def accuracy(subject: Any, test: Source, blind: int = 0) -> float:
    """Share of the words of the pictures' classes that their captions hold. blind=1: the language model alone writes."""
    right = total = 0
    for start in range(0, len(test), 100):
        samples = [test[i] for i in range(start, min(start + 100, len(test)))]
        begun = torch.full((len(samples), 1), subject.system.start)
        if blind:
            language = subject.system.language
            ids = language.generate(language.embed(begun), max_new=24, end=subject.system.end)
        else:
            ids = subject.system.generate_text(subject.read_images([s["image"] for s in samples]), begun, max_new=24)
        said = [set(subject.tokenizer.decode(row).replace(".", " ").replace(",", " ").split()) for row in ids]
        for s, words in zip(samples, said, strict=True):
            shown = test.classes[s["label"]].split()
            right, total = right + sum(word in words for word in shown), total + len(shown)
    return right / total


def compare(train: Source, test: Source, seed: int) -> Outcome:
    eye = eye_of(train, seed)
    reader = train_arm("blip2", small((0, READING)), train, needs=NEEDS, seed=seed, prepare=partial(load, {f"vision.{k}": v for k, v in eye.items()}))
    before, tokenizer = {k: v.clone() for k, v in reader.subject.system.state_dict().items()}, reader.subject.tokenizer

    def arm(*stages: tuple[int, int]) -> Any:
        return train_arm("blip2", small(*stages), train, needs=NEEDS, seed=seed, tokenizer=tokenizer, prepare=partial(load, before))
    both, second = arm((1, ALIGNING), (2, SPEAKING)), arm((2, SPEAKING))
    return Outcome(accuracy(both.subject, test), {
        "stage 2 without stage 1": accuracy(second.subject, test),
        "the frozen language model without a picture": accuracy(both.subject, test, blind=1)},
        {"loss": both.final_loss, "loss without stage 1": second.final_loss})


def run(seed: int) -> Outcome:
    return compare(source(f"scenes:combos?n=3000&seed={seed}"), source("scenes:combos?n=500&seed=1001"), seed)
