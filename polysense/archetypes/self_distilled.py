"""A student learns what its own moving average says: of other views of the picture, and of the patches that are hidden from it.

Abstract: a system says which terms it minimises and is final. iBOT and DINOv2 stand on it; `answers` is DINO's too.
"""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polysense.archetypes.twin_views import TwinViews
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Spec
from polysense.mechanisms.mask_sampler import FillHidden
from polysense.mechanisms.sinkhorn import Sinkhorn
from polysense.mechanisms.varied_mask import VariedBlocks
from polysense.nn.build import build
from polysense.nn.masking import Masking
from polysense.objectives.clusters import sinkhorn
from polysense.objectives.spread import gather

SHARED = ("projector", "patch_head")


@dataclass
class Heard:
    """What both say of a batch of V large views (and the student of the small crops): B pictures, K outputs, M hidden patches of all."""
    student: Tensor                          # logits [V + crops,B,K] of pictures
    target: Tensor                           # probabilities [V,B,K]
    patches: Tensor                          # the student's logits [M,K'] of hidden patches
    patch_target: Tensor                     # probabilities [M,K']
    mask: Tensor                             # [V*B,N], True is hidden
    features: Tensor                         # the student's class tokens of the large views, before the head [V,B,D]
    keep: dict[str, Tensor]                  # what `after_step` and `health` want


class SelfDistilled(TwinViews):
    """`projector` judges pictures, `patch_head` patches (None: the same one). `centre` and `patch_centre` keep the teacher's answers apart: a Centre,
    or Sinkhorn. The student's large views are masked as `sampler` says, with the token of `hide`, of which the teacher has none."""
    heat: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(TwinViews.Config):
        centre: Spec | None                  # None for a system that is not trained any more, as the next
        patch_centre: Spec | None
        patch_head: Spec | None = None
        sampler: Spec = field(default_factory=VariedBlocks.Config)
        hide: Spec = field(default_factory=FillHidden.Config)
        student_temperature: float = 0.1
        teacher_temperature: tuple[float, float] = (0.04, 0.07)     # at first, and from a share `warming` of the training on
        warming: float = 0.1
        still: float = 0.01                  # share of the training in which the last layers of the heads do not move

    def __init__(self, c: Config):
        own = None if c.patch_head is None else c.patch_head.build()
        super().__init__(c.but(teacher=None, reads="student"))
        if own is not None:
            self.patch_head = own
        if c.teacher is not None:
            self.teacher = c.teacher.of(self.student())  # type: ignore[attr-defined]
        elif c.reads == "teacher":
            raise UserError("reads='teacher' without a teacher", "it is 'student' then")
        if not getattr(self.backbone, "prefix", 0):
            raise UserError("self-distillation of patches reads a class token and patches", "take a ViT with prefix=1 as the backbone")
        self.reads, self.sampler = c.reads, c.sampler.build()
        self.hide = build(c.hide, width=self.backbone.width)
        self.centre: Any = None if c.centre is None else c.centre.build()
        self.patch_centre: Any = None if c.patch_centre is None else c.patch_centre.build()
        self.student_temperature, self.ends, self.warming, self.still = c.student_temperature, c.teacher_temperature, c.warming, c.still
        self.register_buffer("heat", torch.tensor(self.ends[0]))
        for head in self.heads():
            if c.still > 0 and hasattr(head, "gate"):
                head.gate.zero_()

    def heads(self) -> list[Any]:
        return [getattr(self, name) for name in SHARED if hasattr(self, name)]

    def student(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone} | {name: getattr(self, name) for name in SHARED if hasattr(self, name)})

    def hear(self, batch: Batch, every: str = "all") -> Heard:
        """Both on one batch. every: the teacher judges "all" patches (a running centre wants their mean), or the "hidden" ones alone."""
        if self.teacher is None or self.centre is None:
            raise UserError(f"this {type(self).__name__} has no teacher: it was opened for its features alone", "train the preset tiny or paper")
        views, prefix = batch["views"], self.backbone.prefix
        images = views.transpose(0, 1).flatten(0, 1)
        masking: Masking = self.sampler(len(images), self.backbone.grid_of(images), images.device)
        with torch.no_grad():
            held = self.teacher.module
            tokens = held["backbone"](images).tokens
            said, place = held["projector"](tokens[:, 0]).float(), tokens[:, prefix:]
            judge = held[SHARED[-1] if SHARED[-1] in held else SHARED[0]]
            patch_said = judge(place.flatten(0, 1) if every == "all" else place[masking.mask]).float()
            patch_mean = patch_said.mean(0, keepdim=True)
            patch_said = patch_said[masking.mask.flatten()] if every == "all" else patch_said
            target = answers(self.centre, said, self.heat).unflatten(0, (views.shape[1], -1))
            patch_target = answers(self.patch_centre, patch_said, self.heat)
        seen = self.hide(self.backbone, images, masking)
        features, parts = seen[:, 0], [seen[:, 0]]
        if "crops" in batch:
            parts.append(self.backbone.pooled(batch["crops"].transpose(0, 1).flatten(0, 1)))
        student = self.projector(torch.cat(parts)).unflatten(0, (-1, len(views)))
        patches = (self.patch_head if hasattr(self, "patch_head") else self.projector)(seen[:, prefix:][masking.mask])
        features = features.unflatten(0, (views.shape[1], -1))
        keep = {"output": gather(said.mean(0, keepdim=True)), "patch_output": gather(patch_mean), "answer": target.flatten(0, 1),
                "one": features[0], "two": features[1]}
        return Heard(student, target, patches, patch_target, masking.mask, features, keep)

    def after_step(self, after: After) -> None:
        super().after_step(after)
        self.centre.move(after.keep["output"])
        self.patch_centre.move(after.keep["patch_output"])
        warm = min(1.0, after.progress / self.warming) if self.warming else 1.0
        self.heat.fill_(self.ends[0] + (self.ends[1] - self.ends[0]) * warm)
        for head in self.heads():
            if hasattr(head, "gate"):
                head.gate.fill_(float(after.progress >= self.still))

    def attend(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,heads,h,w]: where the class token of the last block looks."""
        return self.tower.attention(image)


def answers(centre: Any, said: Tensor, heat: Tensor) -> Tensor:
    """A teacher's logits [N,K] -> its answers [N,K]: Sinkhorn shares them out over the batch, a running mean is taken off first."""
    if isinstance(centre, Sinkhorn):
        return sinkhorn(said, heat, centre.iterations)
    return (centre(said.float()) / heat).softmax(-1)
