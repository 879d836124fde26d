"""A slowly moving copy of a module: momentum encoders and mean teachers."""
from copy import deepcopy
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Self

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part

MODES = ("train", "eval")


class Teacher(Part):
    """theta_t <- m theta_t + (1 - m) theta_s (Tarvainen & Valpola 2017; He et al. 2020, equation 2; Grill et al. 2020).

    `Teacher.Config(...).of(student)` makes a deep copy. Its weights are *buffers*: they are saved with the system, but no optimiser, no
    `trainable` pattern and no gradient can reach them. A system calls `refresh` in `after_start` (the copy made in `__init__` precedes
    loaded weights) and `move` in `after_step`. Parameters are averaged; running statistics of batch norms are the teacher's own.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        momentum: float = 0.996              # m at the first step
        final: float | None = None           # m at the last step, on a cosine between the two; None: constant
        mode: str = "train"                  # how its norms and dropout behave while the system trains: "train" as a student's, or "eval"

        def of(self, student: nn.Module) -> "Teacher":
            """A teacher that starts as a copy of `student`."""
            return Teacher(self, student)

    def __init__(self, c: Config, student: nn.Module):
        super().__init__()
        ends = (c.momentum, c.momentum if c.final is None else c.final)
        if not all(0 <= m <= 1 for m in ends) or c.mode not in MODES:
            raise UserError(f"momentum={c.momentum}, final={c.final}, mode={c.mode!r} make no teacher",
                            f"the decays lie between 0 and 1, the mode is one of {', '.join(MODES)}")
        self.first, self.last = ends
        self.mode = c.mode
        self.averaged = tuple(n for n, _ in student.named_parameters(remove_duplicate=False))
        self.module: Any = _without_parameters(deepcopy(student))

    def momentum(self, progress: float) -> float:
        """m after a share `progress` of the training: final - (final - first) (cos(pi progress) + 1) / 2 (Grill et al. 2020, section 3.2)."""
        return self.last - (self.last - self.first) * (cos(pi * min(max(progress, 0.0), 1.0)) + 1) / 2

    @torch.no_grad()
    def move(self, student: nn.Module, progress: float) -> None:
        """One step of the moving average over the student's parameters. Sharded students (FSDP) are gathered tensor by tensor."""
        mine, share = dict(self.module.named_buffers(remove_duplicate=False)), 1 - self.momentum(progress)
        for name, value in student.named_parameters(remove_duplicate=False):
            mine[name].lerp_(_whole(value.detach()).to(mine[name].dtype), share)

    @torch.no_grad()
    def refresh(self, student: nn.Module) -> None:
        """Becomes an exact copy of the student: parameters and buffers."""
        theirs = dict(student.named_parameters(remove_duplicate=False)) | dict(student.named_buffers(remove_duplicate=False))
        for name, value in self.module.named_buffers(remove_duplicate=False):
            value.copy_(_whole(theirs[name].detach()))

    def thaw(self) -> None:
        """What were parameters of the student become parameters here, for learning from labels what the teacher knows. It follows nobody any more."""
        for name in self.averaged:
            path, _, leaf = name.rpartition(".")
            owner = self.module.get_submodule(path)
            owner.register_parameter(leaf, nn.Parameter(owner._buffers.pop(leaf)))

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.mode == "train")

    @torch.no_grad()
    def forward(self, *args: Any, **kw: Any) -> Any:
        """What the module returns, without a graph."""
        return self.module(*args, **kw)


def _without_parameters(module: nn.Module) -> nn.Module:
    """Every parameter becomes a buffer of the same name."""
    for m in module.modules():
        for name, p in [(n, p) for n, p in m._parameters.items() if p is not None]:
            del m._parameters[name]
            m.register_buffer(name, p.detach())
    return module


def _whole(value: Tensor) -> Tensor:
    gathered = getattr(value, "full_tensor", None)
    return value if gathered is None else gathered()
