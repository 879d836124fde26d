"""Which layers of a trained system go on training, said in one syntax for every system (Lee et al. 2019, What Would Elsa Do?).

    Freeze(last=2, train="head.*")      the last two blocks of every tower, and the head
    Freeze(train="norms biases")        only what normalises, only biases
    Freeze(last=3, gradual=3)           from the top down: in three stages, each with one block more (Howard & Ruder 2018, gradual unfreezing)

What is frozen is in eval mode (`System.train`), has no optimiser state, no weight decay and no average; below the lowest trained layer autograd
keeps nothing, and where something trainable lies before a frozen layer, gradients pass through it.
"""
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.plan import Stage
from polysense.mechanisms.adapter import AdapterConfig, Rename, blocks, copied, patterns

WORDS = ("norms", "biases", "embeddings")


@dataclass(frozen=True, kw_only=True)
class Freeze(AdapterConfig):
    """What trains; everything else is frozen."""
    last: int = 0                            # blocks of every tower, counted from its output
    on: str = "*"                            # the towers that `last` counts in
    train: str = ""                          # besides: the words norms, biases, embeddings, or patterns of parameters such as "head.*"
    gradual: int = 1                         # so many stages, from one block to `last` of them

    def put(self, system: nn.Module) -> None:
        self.trainable(system)

    def trainable(self, system: nn.Module) -> tuple[str, ...]:
        """UserError for a pattern or a tower without a match, and where nothing trains."""
        return self.parts(system, self.last)

    def parts(self, system: nn.Module, last: int) -> tuple[str, ...]:
        out: list[str] = []
        if last:
            towers = [names for _, names in blocks(system, self.on)]
            if not towers:
                raise UserError(f"on={self.on!r} names no tower with blocks", "leave it out, or look at the names: polysense show ID")
            if short := next((n for n in towers if len(n) < last), None):
                raise UserError(f"last={last} of a tower of {len(short)} blocks ({short[0]} ...)", "count fewer, or choose towers with on=")
            out += [f"{name}.*" for names in towers for name in names[-last:]]
        for word in patterns(self.train):
            found = [n for n, _ in system.named_parameters() if (word in kinds_of(system, n) if word in WORDS else fnmatch(n, word))]
            if not found:
                raise UserError(f"train={word!r} matches no parameter", f"give patterns of names, or the words {', '.join(WORDS)}")
            out += found if word in WORDS else [word]
        if not out:
            raise UserError("nothing would train", "say last=2, or train=head.*")
        return tuple(dict.fromkeys(out))

    def stages(self, stage: Stage, system: nn.Module) -> tuple[Stage, ...]:
        if self.gradual == 1:
            return super().stages(stage, system)
        if not 1 <= self.gradual <= max(1, self.last) or stage.steps < self.gradual:
            raise UserError(f"gradual={self.gradual} with last={self.last} in {stage.steps} steps", "at most as many stages as blocks, a step each")
        share, out = stage.steps // self.gradual, []
        for i in range(self.gradual):
            steps = share if i < self.gradual - 1 else stage.steps - share * (self.gradual - 1)
            many = -(-self.last * (i + 1) // self.gradual)
            out.append(stage.but(name=f"{stage.name}_{many}", trainable=self.parts(system, many), steps=steps).but(
                **{"optim.warmup": min(stage.optim.warmup, steps)}))
        return tuple(out)

    def about(self, system: nn.Module, name: Rename = str) -> dict[str, Any]:
        return {"peft_type": None, "trained": list(self.trainable(system))}

    def tensors(self, system: nn.Module, name: Rename = str) -> dict[str, Tensor]:
        """The trained parameters under their own names."""
        wanted = self.trainable(system)
        return {name(n): p.detach() for n, p in system.named_parameters() if any(fnmatch(n, w) for w in wanted)}

    def load(self, system: nn.Module, tensors: dict[str, Tensor], name: Rename = str) -> None:
        wanted = self.tensors(system, name)
        if tensors.keys() != wanted.keys():
            odd = sorted(tensors.keys() ^ wanted.keys())[0]
            raise UserError(f"the file {'has' if odd in tensors else 'lacks'} {odd}", "was it made with another freeze plan?")
        for n, value in wanted.items():
            copied(value, tensors[n], n)

    def settle(self, system: nn.Module) -> None:
        """The trained weights are the system's own already."""


def kinds_of(system: nn.Module, name: str) -> set[str]:
    """Which of the words a parameter is."""
    module, _, leaf = name.rpartition(".")
    kind = type(system.get_submodule(module)).__name__.lower()
    out = {"biases"} if leaf.startswith("bias") else set()
    return out | ({"norms"} if "norm" in kind else set()) | ({"embeddings"} if "embedding" in kind or leaf in ("position", "cls", "embed") else set())
