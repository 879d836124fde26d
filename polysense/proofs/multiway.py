"""What the proofs of Multiway transformers share: scenes of two things, small codes for their patches, and what a hidden word is guessed from."""
from typing import Any

import torch
from torch import Tensor

from polysense.base.system import ImagePlan, Preset, Start, System
from polysense.data.sources import ListSource
from polysense.decoders.codes import CodeTarget
from polysense.decoders.vq_codec import small_codec
from polysense.proofs.arms import exam, train_arm
from polysense.proofs.cappa import told
from polysense.proofs.pool import drawn_once
from polysense.systems.generate import vq_vae
from polysense.train.starts import carry

SIZE, PATCH, WIDE, DEPTH, HEADS, VOCAB, LENGTH, MASK = 32, 8, 64, 3, 2, 64, 12, 4
SPECIAL = (0, 1, 2)
TRAIN, TEST, SHARE = 1200, 200, 0.3
HALF = (0.5, 0.5, 0.5)
DATA = f"scenes of two things of four colours and shapes, told in one sentence each ({TRAIN:,} of train, {TEST} of test)"


def scenes(seed: int, part: str) -> tuple[ListSource, ListSource]:
    """Told scenes to learn from, and others: those of the "test", or of part "dev", on which choices are made."""
    return told(TRAIN, seed), told(TEST, 1001, "test") if part == "test" else told(TEST, 2002)


def target(**more: Any) -> CodeTarget.Config:
    """64 codes, one a patch, of a copy of half the side."""
    plan = ImagePlan(size=SIZE)
    return CodeTarget.Config(codec=small_codec(), size=SIZE // 2, mean=plan.mean, std=plan.std, codec_mean=HALF, codec_std=HALF, **more)


def tokenizer_of_pictures(train: ListSource, seed: int, steps: int = 150) -> Any:
    """`vq_vae` small on copies of half the side."""
    plan = vq_vae.small().but(**{"feed.image.size": SIZE // 2, "feed.train_image.size": SIZE // 2, "stages.0.steps": steps, "stages.0.batch_size": 32,
                                 "stages.0.optim.warmup": steps // 10})
    return train_arm("vq_vae", plan, train, needs=("image",), seed=seed).subject


def lend(codec: Any, system: System) -> None:
    """Puts the tokenizer of pictures into a system."""
    carry(Start(into="target.codec", from_="vq_vae", take="codec"), codec, system)


def sized(preset: Preset, steps: tuple[int, ...], batch: int = 48, lr: float = 2e-3) -> Preset:
    """A preset for these pictures and sentences, read as they are; its stages, of so many steps."""
    plan = preset.but(**{"feed.image": ImagePlan(size=SIZE), "feed.train_image": None, "feed.text.vocab": VOCAB, "feed.text.length": LENGTH})
    return plan.but(stages=tuple(s.but(**{"steps": n, "batch_size": batch, "optim.lr": lr, "optim.warmup": n // 10})
                                 for s, n in zip(plan.stages, steps, strict=True)))


@torch.inference_mode()
def words_guessed(subject: Any, test: ListSource, seed: int) -> dict[str, float]:
    """Share of hidden words guessed, every one hidden with a chance of 0.3, beside the picture that they belong to, and beside another's."""
    whole = drawn_once(test, subject.preset.feed, subject.tokenizer, ("image", "text"))
    image, text = whole["image"], whole["text"]
    hidden = (torch.rand(text.shape, generator=torch.Generator().manual_seed(seed)) < SHARE) & (text > MASK)
    beside = {"its picture": image, "another's picture": image.roll(7, 0)}
    return {name: _right(subject.system, pictures, text, hidden) for name, pictures in beside.items()}


def _right(system: Any, image: Tensor, text: Tensor, hidden: Tensor) -> float:
    said = torch.cat([system.guess(i, t, h).argmax(-1) for i, t, h in zip(image.split(100), text.split(100), hidden.split(100), strict=True)])
    return float((said == text[hidden]).float().mean())


def recall(subject: Any, test: ListSource, rerank: int = 0) -> float:
    """Mean of both directions' recall@5."""
    return sum(exam("retrieval", subject, test, f"{way}_r5", rerank=rerank) for way in ("image_to_text", "text_to_image")) / 2
