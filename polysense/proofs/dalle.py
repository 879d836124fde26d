"""Pictures written token by token show what the sentence says; the same transformer on shuffled captions does not, and ranking eight helps.

Scenes of one large thing at 32 px, 16 kinds (four colours, four shapes): 8x8 codes, then the transformer, then a small CLIP on the same scenes as the
scorer. The codes are a VQ-VAE's (preset tiny_vq): in the minute there is, the discrete VAE's relaxed codes do not yet keep colour and shape.
The judge is another network, trained on real scenes to name both.
"""
from collections.abc import Iterator
from typing import Any

import torch

from polysense.base.batch import Batch
from polysense.base.system import Preset, System
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Source
from polysense.pipeline import Pipeline
from polysense.proofs.arms import train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.judge import agreement, small_clip, train_judge
from polysense.proofs.pool import kept, large
from polysense.systems.generate import dalle, vq_vae
from polysense.towers.clip import body as clip_body
from polysense.towers.clip_text import ClipText
from polysense.train.starts import carry

METRIC, HIGHER_IS_BETTER = "share of drawn scenes whose colour and shape are those of the sentence (best of 8 by the scorer)", True
DATA = "scenes:combos, 32 px, plain, large, 4 colours x 4 shapes (about 3,000 train; sentences of 96 test scenes)"
SCENES = "scenes:combos?size=32&style=plain&shapes=4&colours=4&combos=all&captions=1"
LENGTH = 20
STAGE_1, STEPS, JUDGE = 800, 600, 800        # steps of the codes, of the transformer (words begin to count after some 500), and of the judge


def plan(steps: int) -> Preset:
    return dalle.tiny_vq().but(**{
        "feed.text.length": LENGTH, "config.text_length": LENGTH, "config.body": dalle.body(96, 4, 4, LENGTH, 8, kernel=5),
        "stages.0.steps": steps, "stages.0.batch_size": 32, "stages.0.optim.warmup": steps // 10})


def shuffled(train: Source, of: Preset, tokenizer: Any, seed: int) -> Iterator[Batch]:
    """Batches in which every picture has the caption of another."""
    for batch in Loader(train, of.feed, tokenizer, batch_size=of.stages[0].batch_size, seed=seed, needs=("image", "text")):
        yield batch | {"text": batch["text"].roll(1, 0)}


def compare(seed: int, train: Source, test: Source, asked: int = 96, stage_1: int = STAGE_1, steps: int = STEPS) -> Outcome:
    of, train, needs = plan(steps), kept(train), ("image", "text")
    codec = train_arm("vq_vae", vq_vae.small().but(**{"stages.0.steps": stage_1}), train, needs=("image",), seed=seed).subject
    tokenizer = words(of, train)

    def stand(system: System) -> None:
        carry(of.starts[0], codec, system)  # type: ignore[arg-type]

    told, blind = (train_arm("dalle", of, train, needs=needs, seed=seed, tokenizer=tokenizer, prepare=stand, batches=fed).subject
                   for fed in (None, shuffled(train, of, tokenizer, seed)))
    text = ClipText.Config(vocab=512, length=LENGTH, end=2, body=clip_body(64, 2, 2))
    scorer = train_arm("clip", small_clip(of, text, 16, 150), train, needs=needs, seed=seed, tokenizer=tokenizer).subject
    judge = train_judge(train, of.feed, 16, JUDGE, seed)
    batch = next(iter(Loader(test, of.feed, tokenizer, batch_size=asked, train=False, needs=("image", "text", "label"))))
    scores: dict[str, float] = {}
    for name, subject in (("told", told), ("blind", blind)):
        one, best = drawn(subject, scorer, batch, seed)
        scores |= {name: agreement(judge, best, batch["label"]), f"{name} alone": agreement(judge, one, batch["label"])}
    nll = {n: float(s.system.nll(batch["image"], batch["text"]).mean()) for n, s in (("told", told), ("blind", blind))}
    return Outcome(scores["told"], {"shuffled captions": scores["blind"], "the first of the eight": scores["told alone"]}, {
        "judge on real scenes": agreement(judge, batch["image"], batch["label"]),
        "judge on their reconstructions": agreement(judge, told.system.codec.decode(told.system.codec.ids(batch["image"])), batch["label"]),
        "nats a held-out image token": nll["told"], "nats with shuffled captions": nll["blind"],
        "shuffled, first of the eight": scores["blind alone"]})


@torch.inference_mode()
def drawn(subject: Pipeline, scorer: Pipeline, batch: Batch, seed: int, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of the batch's texts: the first of `count` candidates, and the one that the scorer likes best."""
    torch.manual_seed(seed)
    text = batch["text"].repeat_interleave(count, 0)
    image = subject.system.codec.decode(subject.system.draw(text))
    liked = (scorer.system.encode_image(image) * scorer.system.encode_text(text)).sum(-1).view(-1, count)
    return image[::count], image[torch.arange(len(liked)) * count + liked.argmax(1)]


def run(seed: int) -> Outcome:
    train, test = large(source(f"{SCENES}&n=9000&seed={seed}")), large(source(f"{SCENES}&n=400&seed={seed}", split="test"))
    return compare(seed, train, test, stage_1=STAGE_1, steps=STEPS)
