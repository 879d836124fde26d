"""What can be put onto any system: the interface of an adapter, patterns that say where, and a configuration of a system with one.

An adapter's Config is a value like any other. `put(system)` adds it in place, so objectives, capabilities and names of the base stay what they are;
`Adapted(base=..., adapter=...)` stands in the place of a system's configuration and builds the base with the adapter on it.
"""
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.plan import Preset, Stage
from polysense.base.spec import Spec

Rename = Callable[[str], str]                # name of a layer here -> in the file


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Spec):
    """What every adapter says about itself, and its files: adapter_config.json and adapter_model.safetensors, as the peft library has them."""

    @abstractmethod
    def put(self, system: nn.Module) -> None:
        """Adds the adapter to a system, in place. UserError where it finds no place."""

    @abstractmethod
    def trainable(self, system: nn.Module) -> tuple[str, ...]:
        """Names or patterns of the parameters that train with it; the rest is frozen."""

    @abstractmethod
    def tensors(self, system: nn.Module, name: Rename = str) -> dict[str, Tensor]:
        """Its weights under the names of its file."""

    @abstractmethod
    def about(self, system: nn.Module, name: Rename = str) -> dict[str, Any]:
        """The content of adapter_config.json."""

    @abstractmethod
    def load(self, system: nn.Module, tensors: dict[str, Tensor], name: Rename = str) -> None:
        """Takes weights of such a file. UserError where they do not fit."""

    def settle(self, system: nn.Module) -> None:
        """Merges it into the weights that it stands on and takes it off. UserError where that cannot be."""
        raise UserError("this adapter cannot be merged into weights", "keep it beside them")

    def stages(self, stage: Stage, system: nn.Module) -> tuple[Stage, ...]:
        """How a stage of the base is trained with it: one stage, with what it trains."""
        return (stage.but(trainable=self.trainable(system)),)

    def onto(self, preset: Preset, start: Any) -> Preset:
        """The last stage of a preset with the adapter on its system, whose weights `start` brings. UserError where it finds no place."""
        if not preset.stages:
            raise UserError("this preset trains nothing, so it cannot be adapted", "choose one that is trained")
        config = Adapted(base=preset.config, adapter=self)
        with torch.device("meta"):
            system = config.build()
        return preset.but(config=config, starts=(start,), stages=self.stages(preset.stages[-1], system))


@dataclass(frozen=True, kw_only=True)
class Adapted(Spec):
    """A system's configuration with an adapter; whoever reads fields of the base finds them here too."""
    base: Spec
    adapter: Spec

    @property
    def owner(self) -> type:  # type: ignore[override]
        return type(self.base).owner

    def build(self) -> Any:
        system = self.base.build()
        self.adapter.put(system)  # type: ignore[attr-defined]
        return system

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("base", "adapter"):
            raise AttributeError(name)
        return getattr(self.base, name)


def copied(mine: Tensor, theirs: Tensor, name: str) -> None:
    """UserError for another shape."""
    if mine.shape != theirs.shape:
        raise UserError(f"the adapter's {name} is {tuple(theirs.shape)}, not {tuple(mine.shape)}", "was it made for another system or rank?")
    with torch.no_grad():
        mine.copy_(theirs)


def beside(system: nn.Module, also: str) -> dict[str, nn.Parameter]:
    """Parameters that train in full beside an adapter, by name. UserError for a pattern without a match."""
    out = {}
    for pattern in patterns(also):
        found = {n: p for n, p in system.named_parameters() if fnmatch(n, pattern)}
        if not found:
            raise UserError(f"also={pattern!r} matches no parameter", "look at the names of the system: polysense show ID")
        out |= found
    return out


# -- where ------------------------------------------------------------------------------------------------------------------------------------

def patterns(on: str) -> tuple[str, ...]:
    """`"vision.*.q|v text.*.q"` -> `("vision.*.q", "vision.*.v", "text.*.q")`: words apart, alternatives within a dotted step."""
    return tuple(".".join(steps) for word in on.split() for steps in product(*(step.split("|") for step in word.split("."))))


def chosen(system: nn.Module, on: str, fits: Callable[[nn.Module], bool], what: str) -> list[tuple[str, nn.Module]]:
    """Modules of a kind whose names match. UserError for a pattern without a match, with names that there are."""
    able = [(n, m) for n, m in system.named_modules() if n and fits(m)]
    for pattern in (wanted := patterns(on)):
        if not any(fnmatch(n, pattern) for n, _ in able):
            shown = [n for i, (n, _) in enumerate(able) if i < 3 or i == len(able) - 1]
            raise UserError(f"on={pattern!r} matches no {what}", f"there are such as {', '.join(shown)}" if shown else f"this system has no {what}")
    return [(n, m) for n, m in able if any(fnmatch(n, p) for p in wanted)]


def blocks(system: nn.Module, on: str = "*") -> Iterator[tuple[str, list[str]]]:
    """(name of a tower's stack of blocks, names of its blocks in order) wherever the tower's name matches: `blocks` of transformers, the blocks of
    all `stages` of convolutional networks."""
    for name, module in system.named_modules():
        tower, _, last = name.rpartition(".")
        if last in ("blocks", "stages") and isinstance(module, nn.ModuleList | nn.Sequential) and any(fnmatch(tower, p) for p in patterns(on)):
            held = [(f"{name}.{i}", m) for i, m in enumerate(module)]
            yield name, [n for i, m in held for n in ([f"{i}.{j}" for j in range(len(m))] if isinstance(m, nn.ModuleList | nn.Sequential) else [i])]


def own_weights(module: nn.Module, weights: dict[str, Any], added: Callable[[str], bool]) -> dict[str, Any]:
    """Weights of a base for a module with an adapter: what the adapter added is not in them and stays as it is here."""
    return weights | {k: v for k, v in module.state_dict().items() if added(k) and k not in weights}
