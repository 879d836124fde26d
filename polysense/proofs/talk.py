"""What proofs of systems that write share: eyes that are trained once, and short answers to questions about scenes, scored by exact match."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polysense.base.batch import Batch
from polysense.base.system import Part, Preset, Spec, System
from polysense.data import source
from polysense.data.chat import Chat
from polysense.data.loader import Loader
from polysense.data.sources import Source
from polysense.nn.head import LinearBias
from polysense.pipeline import Pipeline
from polysense.proofs.arms import train_arm
from polysense.systems.backbone import supervised
from polysense.towers.causal_lm import llama


class Features(Part):
    """Features that were computed before, [B,C,h,w] -> [B,h*w,C], in the place of an eye that is frozen anyway."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int

    def __init__(self, c: Config):
        super().__init__()

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(2).mT


def sight(seed: int, steps: int, size: int = 32) -> Any:
    """An eye for scenes of one thing: a small ResNet that learned to name colour and shape of plain pictures, read at `size` pixels."""
    data = source(f"scenes:combos?shapes=circle,cross&colours=6&style=plain&size=32&n=1500&seed={seed}")
    plan = supervised.tiny().but(**{"feed.image.size": size, "feed.train_image": None, "config.head": LinearBias.Config(into=192, out=12),
                                    "stages.0.steps": steps, "stages.0.batch_size": 64, "stages.0.optim.warmup": steps // 10})
    whole = next(iter(Loader(data, plan.feed, None, batch_size=len(data), train=False, needs=("image", "label"))))
    g = torch.Generator().manual_seed(seed)
    batches = ({k: v[rows] for k, v in whole.items()} for rows in (torch.randint(len(data), (64,), generator=g) for _ in range(steps)))
    return train_arm("supervised", plan, data, needs=("image", "label"), seed=seed, batches=batches).subject.system.backbone


def shown(eye: Any, source: Source, size: int = 32) -> Tensor:
    """Features of the places of all pictures of a source, [N,C,h,w]."""
    plan = supervised.tiny().feed.but(**{"image.size": size, "train_image": None})
    with torch.inference_mode():
        made = [eye.dense(b["image"]).permute(0, 3, 1, 2) for b in Loader(source, plan, None, batch_size=200, train=False, needs=("image",))]
    return torch.cat(made).clone()


def fed(source: Source, features: Tensor, preset: Preset, tokenizer: Any, needs: tuple[str, ...], *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless training batches with features [N,C,h,w] of the source in the place of its pictures."""
    for batch in Loader(source, preset.feed, tokenizer, batch_size=batch_size, seed=seed, needs=("index", *needs)):
        yield {**batch, "image": features[batch["index"]]}


def questions(source: Source, each: int = 4) -> list[tuple[int, str, str]]:
    """(sample, question, answer) of the first `each` questions of every sample."""
    return [(i, q, a) for i in range(len(source)) for q, a in source.about(i)["qa"][:each]]


@torch.inference_mode()
def exact_match(subject: Pipeline, features: Tensor | None, asked: list[tuple[int, str, str]], *, short: str = "") -> float:
    """Share of questions answered word for word. features [N,C,h,w] of the samples' pictures; None: asked without any picture."""
    chat, right, system = Chat(subject.preset.feed.text, subject.tokenizer), 0, subject.system
    for some in _chunks(asked, 128):
        ids, _ = chat.batch([chat.row([(f"{q} {short}".strip(), None)], "" if features is None else "before") for _, q, _ in some])
        if features is None:
            x, mask, _ = system.splice(None, ids)  # type: ignore[operator]
            new = system.language.generate(x, mask, max_new=8, end=system.end, pad=system.pad)  # type: ignore[union-attr,operator]
        else:
            new = system.generate_text(features[torch.tensor([i for i, _, _ in some])], ids, max_new=8)  # type: ignore[operator]
        right += sum(subject.tokenizer.decode(n).strip() == a for n, (_, _, a) in zip(new, some, strict=True))
    return right / len(asked)


def _chunks(rows: list[Any], n: int) -> Iterable[list[Any]]:
    return (rows[at:at + n] for at in range(0, len(rows), n))


def carried(weights: dict[str, Tensor], into: str = "") -> Any:
    """`prepare` for train_arm: puts weights into a part of the system."""
    def prepare(system: System) -> None:
        system.get_submodule(into).load_state_dict(weights)
    return prepare


def small(plan: Preset) -> Preset:
    """The preset with features for an eye, a language model of 2 layers x 96 and two turns a conversation: what a proof's minutes allow."""
    return plan.but(**{"config.vision": Features.Config(width=192), "config.language": llama(vocab=1008, length=128, width=96, depth=2, heads=4,
                                                                                             hidden=256),
                       "config.connector.out": 96, "feed.text.turns": 2, "feed.text.length": 96})


def staged(plan: Preset, steps: dict[str, int], batch_size: int) -> Preset:
    """The preset with only the stages named, so many steps each, and no starts: a proof trains its own towers."""
    stages = tuple(s.but(steps=steps[s.name], batch_size=batch_size, **{"optim.warmup": min(s.optim.warmup, steps[s.name] // 10)})
                   for s in plan.stages if steps.get(s.name))
    return plan.but(stages=stages, starts=())
