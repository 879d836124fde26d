"""Queries that were aligned first teach a frozen language model to see.

A tower has learned to name colours and shapes and is frozen, its features are computed once; a small language model reads captions, alone and
behind a bag of their words, and is frozen. BLIP-2 then runs both stages; the controls are its second stage alone, as long, and as long as
both together. Each writes captions of new pictures; colour and shape of what is shown count one each when the caption names them. The
language model without a picture says what the words alone are worth. Sized with another seed: the language model reads until it copies words that
stand before a caption, without which no stage can tell it anything; and the second stage is short, as longer ones say as much with and without the
first.

As filed, aligning is worth many words to a second stage that is equally short; a second stage as long as both together, a stricter
control than the paper's, learns at least as much.
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.system import Part, Preset, Spec
from polysense.data import source
from polysense.data.sources import Source
from polysense.proofs.arms import Arm, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.talk import carried, fed, shown, sight, staged
from polysense.systems.lmm import blip2

METRIC, HIGHER_IS_BETTER = "attributes (colour, shape) that greedy captions name rightly, share", True
SCENES = "scenes:combos?shapes=circle,cross&colours=6&style=plain&size=32&n={}&seed={}"
DATA = "scenes:combos of two shapes and six colours at 32 px (2,000 pairs; 500 new pictures)"
SEE, READ, ALIGN, SPEAK = 80, 800, 300, 20            # steps: the tower, the language model, stage 1, stage 2


class Blocks(Part):
    """A body whose last tokens are known."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def layers(self, x: Tensor, stop: int) -> list[Tensor]:
        return [x]


class Seen(Part):
    """Features that were computed before, [B,C,h,w] -> [B,h*w,C], in the place of a tower that is frozen anyway."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int

    def __init__(self, c: Config):
        super().__init__()
        self.body = Blocks.Config().build()

    def embed(self, image: Tensor) -> tuple[Tensor]:
        return (image.flatten(2).mT,)


PLAN = blip2.tiny().but(config=blip2.tiny().config.but(vision=Seen.Config(width=192), layer=-1)).but(**{
    "config.qformer.width": 96, "config.qformer.depth": 2, "config.qformer.queries": 4, "config.language.body.width": 96,
    "config.language.body.block.mlp.hidden": 384})


def part(steps: dict[str, int]) -> Preset:
    """Some of the stages, so many steps each."""
    return staged(PLAN, steps, 64)


@torch.inference_mode()
def accuracy(subject: Any, test: Source, features: Tensor | None) -> float:
    """Share of the words of the pictures' classes that their captions hold. features None: the language model alone writes."""
    begun, language = torch.full((len(test), 1), subject.system.start), subject.system.language
    new = subject.system.generate_text(features, begun, max_new=24) if features is not None else \
        language.generate(language.embed(begun), max_new=24, end=subject.system.end)
    said = [set(subject.tokenizer.decode(row).replace(".", " ").replace(",", " ").split()) for row in new]
    asked = [(n, word) for n, label in enumerate(test.labels()) for word in test.classes[label].split()]
    return sum(word in said[n] for n, word in asked) / len(asked)


def compare(train: Source, test: Source, seed: int) -> Outcome:
    eye, tokenizer = sight(seed, SEE), words(PLAN, train)
    seen, held = shown(eye, train), shown(eye, test)

    def arm(steps: dict[str, int], start: Arm | None = None) -> Arm:
        plan = part(steps)
        return train_arm("blip2", plan, train, needs=("text",), seed=seed, tokenizer=tokenizer,
                         prepare=carried(dict(start.subject.system.state_dict())) if start else None,
                         batches=fed(train, seen, plan, tokenizer, ("text",), batch_size=64, seed=seed))

    reader = arm({"read": READ})
    aligned = arm({"align": ALIGN}, reader)
    both, second, long = arm({"speak": SPEAK}, aligned), arm({"speak": SPEAK}, reader), arm({"speak": ALIGN + SPEAK}, reader)
    return Outcome(accuracy(both.subject, test, held), {
        "stage 2 without stage 1": accuracy(second.subject, test, held),
        "stage 2 as long as both": accuracy(long.subject, test, held),
        "the frozen language model without a picture": accuracy(reader.subject, test, None)},
        {"loss": both.final_loss, "loss without stage 1": second.final_loss, "loss of the longer": long.final_loss})


def run(seed: int) -> Outcome:
    return compare(source(SCENES.format(2000, seed)), source(SCENES.format(500, 1001)), seed)
