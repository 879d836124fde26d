"""A judge who also asks whether picture and sentence agree makes the generator draw what the sentence says.

Handwritten digits at 32 px with ten sentences ("the digit seven"). A small CLIP gives the text tower, which is then frozen. Three arms of equal
steps: with mismatched sentences (GAN-CLS), without them, and trained on shuffled sentences. A classifier trained on real digits says which
digit each of 1,000 drawn ones is; the Frechet distance is taken in its features. Sized on training pictures.
"""
from collections.abc import Iterator

import torch

from polysense.base.batch import Batch
from polysense.base.system import Preset, System
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Sample, Source, Subset
from polysense.proofs.arms import some_of, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.judge import agreement, frechet, labelled, small_clip, train_judge
from polysense.systems.generate import text_conditional_gan as gan
from polysense.towers.clip import body as clip_body
from polysense.towers.clip_text import ClipText
from polysense.train.starts import carry

METRIC, HIGHER_IS_BETTER = "share of 1,000 drawn digits that a classifier of real ones reads as the digit asked for", True
DATA = "mnist at 32 px, ten sentences (10,000 train; the classifier and the distance take others)"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 8


class Told(Subset):
    """A source of digits with a sentence for each."""

    def __init__(self, base: Source):
        super().__init__(base, range(len(base)))
        self.offers = (*base.offers, "text", "text_mask")

    def _about(self, i: int) -> Sample:
        about = super()._about(i)
        return {**about, "captions": [f"the digit {NAMES[int(about['label'])]}"]}

    def captions(self) -> Iterator[str]:
        return (f"the digit {n}" for n in NAMES)


def plan(steps: int) -> Preset:
    text = ClipText.Config(vocab=300, length=LENGTH, end=2, body=clip_body(64, 2, 2))
    return gan.tiny().but(config=gan.config(text, 64, 32, 24, 24), **{
        "feed.text.vocab": 300, "feed.text.length": LENGTH, "feed.train_image.flip": 0.0, "stages.0.steps": steps, "stages.0.optim.lr": 1e-3})


def compare(seed: int, train: Source, real: Source, steps: int = 200) -> Outcome:
    """train: digits to learn from; real: others, for the classifier and the distance."""
    of, told = plan(steps), Told(train)
    tokenizer = words(of, told)
    tower = train_arm("clip", small_clip(of, of.config.text, 16, 60), told, needs=("image", "text"), seed=seed, tokenizer=tokenizer).subject

    def stand(system: System) -> None:
        carry(of.starts[0], tower, system)  # type: ignore[arg-type]

    def shuffled() -> Iterator[Batch]:
        for batch in Loader(told, of.feed, tokenizer, batch_size=64, seed=seed, needs=("image", "text")):
            yield batch | {"text": batch["text"][torch.randperm(len(batch["text"]))]}

    judge = train_judge(real, of.feed, 10, 150, seed)
    held = next(labelled(real, of.feed, 1000, False))
    label = torch.arange(1000) % 10
    text = tokenizer([f"the digit {NAMES[i]}" for i in label.tolist()])
    score, far = {}, {}
    for name, arm, batches in (("full", of, None), ("no mismatched sentences", of.but(**{"stages.0.weights": (("wrong", 0.0),)}), None),
                               ("shuffled sentences", of, shuffled())):
        subject = train_arm("text_conditional_gan", arm, told, needs=("image", "text"), seed=seed, tokenizer=tokenizer, prepare=stand,
                            batches=batches).subject
        torch.manual_seed(seed)
        drawn = subject.system.generate_image(text, steps=1)
        score[name], far[f"Frechet distance, {name}"] = agreement(judge, drawn, label), frechet(judge, drawn, held["image"])
    return Outcome(score.pop("full"), score, {"classifier on real digits": agreement(judge, held["image"], held["label"]), **far})


def run(seed: int) -> Outcome:
    return compare(seed, some_of(source("mnist"), 10_000, seed), source("mnist", split="test"))
