"""BEiT-3 on drawn scenes: hidden words are guessed from the picture, and what was learned helps captions and retrieval.

Scenes of two things, told as "a red star left of a blue cross"; visual codes are those of a vector-quantised tokenizer taught by a small CLIP, both
trained first on the same scenes. The score is the share of hidden words of unseen captions guessed beside their own picture, the baseline the same
network beside the picture of another. In the notes, after a short tuning each: the share of the four told words (colours and shapes) that written
captions have right at their places, beside that of the commonest caption; recall@5 after contrastive tuning, and after the same from scratch.
Sizes are a first guess, after those of VLMo's proof.
"""
from collections import Counter
from typing import Any

import torch

from polysense.base.system import Preset, System
from polysense.data.sources import ListSource
from polysense.decoders.codes import CodeTarget
from polysense.pipeline import Pipeline
from polysense.proofs import multiway
from polysense.proofs.arms import train_arm
from polysense.proofs.beit_v2 import tokenizer
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import lending
from polysense.proofs.multiway import DEPTH, HALF, HEADS, LENGTH, MASK, PATCH, SIZE, SPECIAL, VOCAB, WIDE
from polysense.proofs.small import pair, plain_clip
from polysense.systems.selfsup import beit_3
from polysense.train.starts import carry

METRIC, HIGHER_IS_BETTER = "share of hidden words guessed beside their own picture", True
DATA = multiway.DATA
CLIP, CODES, MASKED, TUNED, WRITTEN = 100, 120, 350, 80, 150
TOLD = (1, 2, 6, 7)                          # places of colours and shapes in "a red star left of a blue cross"


def small_clip(train: ListSource, seed: int) -> Pipeline:
    plan = plain_clip(CLIP)
    plan = plan.but(config=plan.config.but(**pair(patch=PATCH, width=48, depth=2)), **{"stages.0.batch_size": 64, "feed.train_image": None})
    return train_arm("clip", plan, train, needs=("image", "text"), seed=seed).subject


def codes_of(clip: Pipeline) -> Preset:
    """VQ-KD, a code for each patch of this CLIP's."""
    plan = tokenizer(clip)
    return plan.but(**{"config.codec.encoder.image_size": SIZE, "config.decoder.image_size": SIZE // PATCH, "config.codec.codes": 64,
                       "feed.image.size": SIZE, "feed.train_image": None, "stages.0.steps": CODES, "stages.0.batch_size": 48})


def plan(codec: Any, stage: int) -> Preset:
    """The masked stage (0), contrastive tuning (1) or captions (2)."""
    base: Any = beit_3.tiny()
    net = beit_3.shared(SIZE, PATCH, WIDE, DEPTH, HEADS, 1, VOCAB, LENGTH)
    made = multiway.sized(base, (MASKED, TUNED, WRITTEN), batch=72)
    at = made.feed.image
    assert at is not None
    target = CodeTarget.Config(codec=codec, size=SIZE, mean=at.mean, std=at.std, codec_mean=HALF, codec_std=HALF)
    stages = (made.stages[0], *beit_3.tuning(net, *made.stages[1:]))
    return made.but(config=beit_3.config(net, target, 6, 2, MASK, SPECIAL), stages=(stages[stage],))


@torch.inference_mode()
def told(subject: Pipeline, train: ListSource, test: ListSource) -> dict[str, float]:
    """Share of told words right at their places, of written captions and of the commonest one."""
    truth, common = list(test.captions()), Counter(train.captions()).most_common(1)[0][0]
    said = subject.caption([s["image"] for s in test.samples], max_new=LENGTH)

    def right(texts: list[str]) -> float:
        rows = [(a.split() + [""] * LENGTH, b.split()) for a, b in zip(texts, truth, strict=True)]
        return sum(a[i] == b[i] for a, b in rows for i in TOLD) / (len(TOLD) * len(rows))
    return {"told words right in captions": right(said), "in the commonest caption": right([common] * len(truth))}


def run(seed: int, part: str = "test") -> Outcome:
    train, test = multiway.scenes(seed, part)
    clip, needs = small_clip(train, seed), ("image", "text")
    named = codes_of(clip)
    tokens: Any = train_arm("beit_v2", named, train, needs=("image",), seed=seed, prepare=lending(named, clip)).subject
    codec = named.config.codec  # type: ignore[attr-defined]

    def arm(stage: int, weights: dict[str, torch.Tensor] | None, words: Any = None) -> Any:
        def stand(system: System) -> None:
            carry(beit_3.tiny().starts[0], tokens, system)
            if weights is not None:
                system.load_state_dict(weights)
        return train_arm("beit_3", plan(codec, stage), train, needs=needs, seed=seed, tokenizer=words, prepare=stand)

    made = arm(0, None)
    words = made.subject.tokenizer
    weights = {k: v.clone() for k, v in made.subject.system.state_dict().items()}
    guessed = multiway.words_guessed(made.subject, test, seed)
    return Outcome(guessed["its picture"], {"another's picture": guessed["another's picture"]}, {
        **told(arm(2, weights, words).subject, train, test), "recall@5 after tuning": multiway.recall(arm(1, weights, words).subject, test),
        "from scratch": multiway.recall(arm(1, None, words).subject, test), "chance of recall@5": 5 / len(test), "final loss": made.final_loss})
