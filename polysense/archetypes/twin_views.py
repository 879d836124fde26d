"""Views of one picture through one tower, or through it and a slowly moving copy of it. Abstract: a system adds its objective and is final."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Spec, System
from polysense.objectives import health

READS = ("student", "teacher")


class TwinViews(System):
    """`backbone`, a `projector` on its pooled feature that is thrown away after training, and where there is one a `teacher`: a moving average
    of both (MoCo, BYOL, DINO). `project` and `aim` are what objectives compare.

    Transfer reads the backbone's pooled feature: of the `student`, or of the `teacher` (DINO).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        backbone: Spec
        projector: Spec
        teacher: Spec | None = None          # a Teacher.Config
        reads: str = "student"               # whose backbone encode_image reads

    def __init__(self, c: Config):
        super().__init__()
        if c.reads not in READS or (c.reads == "teacher" and c.teacher is None):
            raise UserError(f"reads={c.reads!r} {'without' if c.teacher is None else 'with'} a teacher", f"it is one of {', '.join(READS)}")
        self.backbone, self.projector = c.backbone.build(), c.projector.build()
        self.teacher: Any = None if c.teacher is None else c.teacher.of(self.student())  # type: ignore[attr-defined]
        self.reads = c.reads

    def student(self) -> nn.ModuleDict:
        """What the teacher follows: backbone and projector, under the names that they have in it."""
        return nn.ModuleDict({"backbone": self.backbone, "projector": self.projector})

    def project(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> the student's projection [B,D]."""
        return self.projector(self.backbone.pooled(image))

    @torch.no_grad()
    def aim(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> the teacher's projection [B,D], without a graph."""
        held = self.teacher.module
        return held["projector"](held["backbone"].pooled(image))

    @property
    def tower(self) -> Any:
        """The backbone that transfer reads."""
        return self.teacher.module["backbone"] if self.reads == "teacher" else self.backbone

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the pooled feature below the projector."""
        return F.normalize(self.tower.pooled(image).float(), dim=-1)

    def after_start(self) -> None:
        """The teacher becomes a copy of what the Starts brought."""
        if self.teacher is not None:
            self.teacher.refresh(self.student())

    def after_step(self, after: After) -> None:
        """The teacher moves. Keys of the next step come from the weights of this one: MoCo's update before its forward pass."""
        if self.teacher is not None:
            self.teacher.move(self.student(), after.progress)

    def health(self, keep: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the features of two views that an objective kept as `one` and `two` [B,D], and of the teacher's distributions `answer` [N,K]."""
        out = health.of_pairs(keep["one"], keep["two"]) if "one" in keep else {}
        return out | (health.of_answers(keep["answer"]) if "answer" in keep else {})

    @torch.no_grad()
    def doubts(self, batch: Batch) -> Iterator[str]:
        """Views that are the same picture teach nothing: every system agrees with itself."""
        if "views" in batch and bool((batch["views"][:, 0] == batch["views"][:, 1]).all()):
            yield "the two views of a picture are the same: is every augmentation off?"
