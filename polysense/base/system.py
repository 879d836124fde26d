"""The one base class of every trainable system. Torch starts here."""
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from polysense.base.batch import Batch, Losses
from polysense.base.errors import UserError
from polysense.base.plan import (
    AdaptiveClip,
    AudioPlan,
    AugmentPlan,
    ChatPlan,
    EpisodePlan,
    Feed,
    ImagePlan,
    Optim,
    PackPlan,
    PairPlan,
    Preset,
    PromptPlan,
    SidesPlan,
    Stage,
    Start,
    TextPlan,
    VideoPlan,
    ViewPlan,
)
from polysense.base.spec import Configured, Spec

__all__ = ["AdaptiveClip", "After", "AudioPlan", "AugmentPlan", "Batch", "ChatPlan", "EpisodePlan", "Feed", "ImagePlan", "Losses", "Optim",
           "PackPlan", "PairPlan", "Part", "Preset", "PromptPlan",
           "SidesPlan", "Spec", "Stage", "Start", "System", "TextPlan", "VideoPlan", "ViewPlan", "final"]

T = TypeVar("T", bound=type)


@dataclass
class After:
    """What a system may look at when it moves its non-gradient state."""
    step: int                                # steps done in this stage, counting this one
    progress: float                          # step / stage.steps
    optimizer: torch.optim.Optimizer
    keep: dict[str, Tensor]                  # what the objective kept


class Part(Configured, nn.Module):
    """A building block: built from its own nested Config, knows nothing of systems."""

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """What becomes of `value`, the weight `name` of a Start that was trained at another size. A part that can convert it (positions of
        another grid) does; the rest returns it as it is, and the Start is refused for its shape."""
        return value

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What become of the weights of a Start into this part, by their names below it. A part that another form of itself was trained for
        (BEiT's shared table, copied to every layer) renames, copies or leaves behind; the rest returns them as they are."""
        return weights


class System(Part, ABC):
    """Holds weights, implements capabilities, offers objectives. Archetypes are abstract, recipes are `@final`."""

    choices: ClassVar[Mapping[str, Mapping[str, Callable[[Preset], Preset]]]] = {}
    """Slots that can be set by a word: {slot: {word: preset -> the same preset with that in the slot, and what has to go with it}}."""

    def after_start(self) -> None:
        """Called once after the Starts' weights are in: copies taken of them (teachers) are made or refreshed here."""

    def after_step(self, after: After) -> None:
        """Non-gradient state (EMA teachers, queues, centres) moves here and nowhere else."""

    def health(self, keep: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars that say how the training is doing, such as the spread of the features, from what the objective kept: asked every few steps, after
        `after_step`, without a graph; logged and warned of (train/health.py), never minimised."""
        return {}

    def doubts(self, batch: Batch) -> Iterable[str]:
        """Reasons of its own not to begin training on batches like this one, each a sentence; `train.preflight` asks before the first step."""
        return ()

    def choose_trainable(self, patterns: Iterable[str]) -> None:
        """Freeze everything but the parameters whose names match; a pattern that matches nothing is an error."""
        patterns, names = tuple(patterns), [n for n, _ in self.named_parameters()]
        for pattern in patterns:
            if not any(fnmatch(n, pattern) for n in names):
                raise UserError(f"trainable={pattern!r} matches no parameter", f"the first names are {', '.join(names[:4])}")
        for name, p in self.named_parameters():
            p.requires_grad_(any(fnmatch(name, q) for q in patterns))

    def train(self, mode: bool = True) -> Self:
        """As in torch, but a module all of whose parameters are frozen stays in eval mode, at any depth."""
        super().train(mode)
        if mode:
            for m in self.modules():
                ps = list(m.parameters())
                if ps and not any(p.requires_grad for p in ps):
                    m.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def final(cls: T) -> T:
    """Marks the class of a recipe: may not be subclassed."""
    def refuse(sub: Any, **kw: Any) -> None:
        raise TypeError(f"{cls.__name__} is a finished system; share code through an archetype or a part instead")
    cls.__init_subclass__ = classmethod(refuse)  # type: ignore[assignment]
    cls.is_final = True  # type: ignore[attr-defined]
    return cls
