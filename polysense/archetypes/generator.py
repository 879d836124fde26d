"""A generator trained against a discriminator, by two optimisers in turn. Abstract: a system adds its two objectives and is final."""
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from polysense.base.system import Batch, Losses, Spec, Stage, System


class Generator(System):
    """`generator`, `discriminator`, and the loop for `Stage.run`; a recipe says what each of the two pays (`judge`, `deceive`)."""

    players = ("discriminator", "generator")

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        generator: Spec
        discriminator: Spec

    def __init__(self, c: Config):
        super().__init__()
        self.generator, self.discriminator = c.generator.build(), c.discriminator.build()

    @abstractmethod
    def judge(self, batch: Batch) -> Losses:
        """What the discriminator pays. What is drawn for it is drawn without a gradient."""

    @abstractmethod
    def deceive(self, batch: Batch) -> Losses:
        """What the generator pays, through the discriminator."""

    def losses(self, batch: Batch) -> Losses:
        """Both at once, for reading: training goes through `alternate`, where each player pays its own part alone."""
        return together(self, batch)


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through the module, none is left in its parameters."""
    held = [p for p in module.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


def together(system: Any, batch: Batch) -> Losses:
    """What both players of a system pay for a batch, the first without a gradient for the second and the other way round."""
    judged = system.judge(batch)
    with still(getattr(system, system.players[0])):
        drawn = system.deceive(batch)
    return Losses(**judged, **drawn).keeping(**drawn.keep)


def alternate(system: Any, stage: Stage, batches: Iterator[Batch], training: Any) -> Iterator[Losses]:
    """For `Stage.run` (Goodfellow et al. 2014, algorithm 1, with one step of each player): on every batch one step of the discriminator on
    detached pictures, then one of the generator through the discriminator, whose parameters get no gradient.

    `system.players` names the two modules, the judge first; a judge that pays nothing (yet) stays as it is. Schedule, clipping, ranks, precision,
    checkpoints and resumption are those of `train.fit`; both players' terms are logged by name.
    """
    judge, artist = (training.optimizer_for(name, f"{name}.*") for name in system.players)
    critic = getattr(system, system.players[0])
    for batch in batches:
        with training.autocast(True):
            judged = system.judge(batch)
            total = judged.total([(k, v) for k, v in stage.weights if k in judged]) if judged else None
        if total is not None:
            training.descend(total, judge)
        with still(critic):
            with training.autocast(True):
                drawn = system.deceive(batch)
                total = drawn.total([(k, v) for k, v in stage.weights if k in drawn])
            training.descend(total, artist)
        yield Losses(**judged, **drawn).keeping(**drawn.keep)
