"""What proofs of systems that write share: short answers to questions about scenes, scored by exact match."""
from typing import Any

import torch
from torch import Tensor

from polysense.base.system import Preset, System
from polysense.data.chat import Chat
from polysense.data.sources import Source
from polysense.pipeline import Pipeline
from polysense.pipeline.talk import write
from polysense.proofs.arms import train_arm
from polysense.systems.align import clip
from polysense.towers.causal_lm import llama


def sight(source: Source, seed: int, steps: int, size: int = 64) -> dict[str, Tensor]:
    """A picture tower trained as clip's tiny preset on the captions of a source, at `size` pixels."""
    plan = clip.tiny().but(data=source.name, **{
        "stages.0.steps": steps, "stages.0.batch_size": 64, "stages.0.optim.warmup": steps // 10, "feed.image.size": size,
        "feed.train_image.size": size, "config.vision.image_size": size})
    return dict(train_arm("clip", plan, source, needs=("image", "text"), seed=seed).subject.system.vision.state_dict())  # type: ignore[union-attr]


def questions(source: Source, each: int = 4) -> list[tuple[int, str, str]]:
    """(sample, question, answer) of the first `each` questions of every sample."""
    return [(i, q, a) for i in range(len(source)) for q, a in source.about(i)["qa"][:each]]


def exact_match(subject: Pipeline, source: Source, asked: list[tuple[int, str, str]], *, shuffled: bool = False, short: str = "") -> float:
    """Share of questions answered word for word. shuffled: about the picture of another sample."""
    n, pictures = len(source), {i: source.load(i, "image") for i in range(len(source))}
    said = write(subject, [pictures[(i + n // 2) % n if shuffled else i] for i, _, _ in asked],
                 [[(f"{q} {short}".strip(), None)] for _, q, _ in asked], max_new=8, batch_size=128)
    return sum(reply.strip() == answer for reply, (_, _, answer) in zip(said, asked, strict=True)) / len(asked)


def blind_match(subject: Pipeline, asked: list[tuple[int, str, str]]) -> float:
    """The same of the language model alone: the questions without any picture."""
    chat = Chat(subject.preset.feed.text, subject.tokenizer)
    rows = [chat.row([(q, None)], picture="")[0] for _, q, _ in asked]
    system: Any = subject.system
    right = 0
    for start in range(0, len(rows), 128):
        some = rows[start:start + 128]
        ids = torch.tensor([r + [0] * (max(map(len, some)) - len(r)) for r in some])
        with torch.inference_mode():
            x, mask, _ = system.splice(None, ids)
            new = system.language.generate(x, mask, max_new=8, end=system.end, pad=system.pad)
        right += sum(subject.tokenizer.decode(n).strip() == a for n, (_, _, a) in zip(new, asked[start:start + 128], strict=True))
    return right / len(rows)


def carried(weights: dict[str, Tensor], into: str) -> Any:
    """`prepare` for train_arm: puts a tower's weights into a part of the system."""
    def prepare(system: System) -> None:
        system.get_submodule(into).load_state_dict(weights)
    return prepare


def small(plan: Preset) -> Preset:
    """The preset with a language model of 3 layers x 128 and two turns a conversation: what a proof's minute and a half allows."""
    return plan.but(**{"config.language": llama(vocab=1008, length=128, width=128, depth=3, heads=4, hidden=352), "config.connector.out": 128,
                       "feed.text.turns": 2, "feed.text.length": 96})


def staged(plan: Preset, steps: dict[str, int], batch_size: int) -> Preset:
    """The preset with only the stages named, so many steps each, and no starts: a proof trains its own towers."""
    stages = tuple(s.but(steps=steps[s.name], batch_size=batch_size, **{"optim.warmup": min(s.optim.warmup, steps[s.name] // 10)})
                   for s in plan.stages if steps.get(s.name))
    return plan.but(stages=stages, starts=())
