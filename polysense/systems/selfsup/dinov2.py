"""DINOv2: DINO and iBOT together, steadied and scaled until the frozen features need no fine-tuning.

    L = L_DINO + L_iBOT + 0.1 (L_KoLeo(view 1) + L_KoLeo(view 2))                                                   (section 4)
    L_DINO: each crop's class token says what the teacher says of the other large crops
    L_iBOT: each hidden patch says what the teacher says of it unhidden; only hidden patches pass that head, which is another than DINO's
    L_KoLeo = -mean log min over j != i of |x_i - x_j|, of the student's class tokens before the head, on the sphere

The teacher's answers are shared out over the batch by three rounds of Sinkhorn-Knopp in place of a running centre; for patches the batch is all
hidden ones. Exactly half of the large crops are masked, by ratios spread evenly over a tenth to a half. The tower has layer scale and, at the largest
size, gated MLPs, and stochastic depth that computes nothing for what it drops; registers put four tokens into it that take up what would otherwise
stain the patches. Smaller towers are distilled from the largest, frozen (`learn_from_guide`): no mask, no stochastic depth, L_iBOT on all patches of
the large crops, the moving average kept.
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.archetypes.self_distilled import SHARED, SelfDistilled, answers
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import CropFeed, RisingDecay
from polysense.base.system import Batch, ImagePlan, Losses, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.mechanisms.centre import Centre
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.mechanisms.sinkhorn import Sinkhorn
from polysense.mechanisms.teacher import Teacher
from polysense.mechanisms.varied_mask import VariedBlocks
from polysense.nn.head import Nothing
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.norm import LayerNorm
from polysense.nn.prototypes import Prototypes
from polysense.nn.transformer import Transformer
from polysense.objectives.twin import distil_ce, koleo, masked_ce
from polysense.towers.registers import RegisteredBody, ResizedViT, SkippingBlock
from polysense.weights import dinov2_facebook, dinov2_hf

card = Card(
    name="DINOv2", paper="Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, TMLR 2024",
    arxiv="2304.07193", year=2024, says="Learns features of pictures and patches without labels that are good as they are, frozen.",
    needs=("views", "crops"), can=("encode_image", "attend"), official="facebookresearch/dinov2",
)

PARAMETERS = 1_251_696_384                   # ViT-g/14 at 224 px with its mask token, and two heads of 131,072 outputs

weights = {"hf": dinov2_hf.LAYOUT, "facebook": dinov2_facebook.LAYOUT}


@final
class DINOv2(SelfDistilled):
    @dataclass(frozen=True, kw_only=True)
    class Config(SelfDistilled.Config):
        koleo: float = 0.1                   # weight of each view's
        guide: Spec | None = None            # a larger, frozen tower
        guide_head: Spec | None = None       # its head, and the one for patches where this system has one

    def __init__(self, c: Config):
        super().__init__(c)
        self.koleo = c.koleo
        if c.guide is not None and c.guide_head is not None:
            heads = SHARED if c.patch_head is not None else SHARED[:1]
            self.guide: Any = nn.ModuleDict({"backbone": c.guide.build()} | {name: c.guide_head.build() for name in heads})

    def losses(self, batch: Batch) -> Losses:
        heard = self.hear(batch, "hidden")
        out = Losses(distil=distil_ce(heard.student, heard.target, self.student_temperature),
                     patches=masked_ce(heard.patches, heard.patch_target, heard.mask, self.student_temperature))
        return self.spread(out, heard.features).keeping(**heard.keep)

    def spread(self, out: Losses, features: Tensor) -> Losses:
        """The losses and, where it has a weight, KoLeo's of the student's class tokens [V,B,D], one view at a time."""
        if self.koleo:
            out["koleo"] = self.koleo * torch.stack([koleo(view) for view in features]).sum()
        return out

    def learn_from_guide(self, batch: Batch) -> Losses:
        """Distillation from a frozen, larger tower (section 5): its answers in place of the own average's, nothing masked, and the patch loss on
        every patch of the large crops. UserError without such a tower, or where its patches are other places."""
        if not hasattr(self, "guide"):
            raise UserError("this DINOv2 has no guide to learn from", "train the preset distilled, or objective losses")
        views = batch["views"]
        images, crops = (x.transpose(0, 1).flatten(0, 1) for x in (views, batch["crops"]))
        if self.guide["backbone"].grid_of(images) != self.backbone.grid_of(images):
            raise UserError(f"the guide has {self.guide['backbone'].grid_of(images)} patches, this tower {self.backbone.grid_of(images)}",
                            "choose patches of one size")
        head = SHARED[1] if SHARED[1] in self.guide else SHARED[0]
        with torch.no_grad():
            tokens = self.guide["backbone"](images).tokens
            said = self.guide["projector"](tokens[:, 0]).float()
            patch_said = self.guide[head](tokens[:, self.guide["backbone"].prefix:].flatten(0, 1)).float()
            target = answers(self.centre, said, self.heat).unflatten(0, (views.shape[1], -1))
            patch_target = answers(self.patch_centre, patch_said, self.heat)
        seen = self.backbone(images).tokens
        patches, features = seen[:, self.backbone.prefix:], seen[:, 0].unflatten(0, (views.shape[1], -1))
        student = self.projector(torch.cat([seen[:, 0], self.backbone.pooled(crops)])).unflatten(0, (-1, len(views)))
        every = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        out = Losses(distil=distil_ce(student, target, self.student_temperature),
                     patches=masked_ce(getattr(self, head)(patches.flatten(0, 1)), patch_target, every, self.student_temperature))
        return self.spread(out, features).keeping(
            output=said.mean(0, keepdim=True), patch_output=patch_said.mean(0, keepdim=True), answer=target.flatten(0, 1), one=features[0],
            two=features[1])


def centred(of: Preset) -> Preset:
    """With running centres in place of Sinkhorn."""
    config: Any = of.config
    return of.but(**{"config.centre": Centre.Config(width=config.projector.out),
                     "config.patch_centre": Centre.Config(width=(config.patch_head or config.projector).out)})


DINOv2.choices = {"centre": {"sinkhorn": lambda p: p, "mean": centred},
                  "heads": {"two": lambda p: p, "one": lambda p: p.but(**{"config.patch_head": None})}}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tower(size: int, patch: int, width: int, depth: int, heads: int, mlp: Spec | None = None, drop_path: float = 0.0, scale: float = 1e-5,
          registers: int = 0) -> ResizedViT.Config:
    norm = LayerNorm.Config(eps=1e-6)
    block = SkippingBlock.Config(norm=norm, layer_scale=scale, mlp=mlp or MLP.Config())
    said: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "norm": norm, "block": block, "drop_path": drop_path}
    body = RegisteredBody.Config(**said, registers=registers) if registers else Transformer.Config(**said)
    return ResizedViT.Config(image_size=size, patch=patch, body=body)


def config(backbone: ResizedViT.Config, outputs: int, hidden: int, bottleneck: int, teacher: Teacher.Config, **more: Any) -> DINOv2.Config:
    head = Prototypes.Config(into=backbone.width, out=outputs, hidden=hidden, bottleneck=bottleneck)
    return DINOv2.Config(backbone=backbone, projector=head, patch_head=head, teacher=teacher, reads="teacher", centre=Sinkhorn.Config(),
                         patch_centre=Sinkhorn.Config(), **more)


def tiny() -> Preset:
    view = ViewPlan(size=32, scale=(0.4, 1.0), flip=0.5, jitter=0.5, jitter_by=(0.3, 0.0, 0.0, 0.0))
    return Preset(
        data="scenes:single",
        feed=CropFeed(image=ImagePlan(size=32, mean=MEAN, std=STD), views=(view, view), crops=(view.but(size=16, scale=(0.1, 0.4)),) * 2),
        config=config(tower(32, 4, 96, 4, 3, scale=0.1), 256, 192, 64, Teacher.Config(momentum=0.99, final=1.0, mode="eval"), still=0.02,
                      sampler=VariedBlocks.Config(draw="even", blocks=BlockMask.Config(least=4, fill="exact"))),
        stages=(Stage(objective=DINOv2.losses, steps=600, batch_size=64, optim=RisingDecay(
            lr=1e-3, weight_decay=0.04, final_decay=0.2, warmup=60, clip=3.0, lr_scale=(("backbone.patch.*", 0.2),))),))


def paper() -> Preset:
    """ViT-g/14 on LVD-142M, 625,000 steps of batch 3072 at 224 px, eight small crops of 98 px (section 4 and table 16)."""
    base = ViewPlan(size=224, scale=(0.32, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.2, 0.1), grey=0.2)
    lr, epoch = 2e-4 * (3072 / 1024) ** 0.5, 1250
    giant = tower(224, 14, 1536, 40, 24, GatedMLP.Config(hidden=4096, bias="gate up down"), drop_path=0.4)
    return Preset(
        data="lvd142m",
        feed=CropFeed(image=ImagePlan(size=224, mean=MEAN, std=STD), views=(base.but(blur=1.0), base.but(blur=0.1, solarize=0.2)),
                      crops=(base.but(size=98, scale=(0.05, 0.32), blur=0.5),) * 8),
        config=config(giant, 131_072, 2048, 384, Teacher.Config(momentum=0.994, final=1.0, mode="eval"), warming=30 / 500, still=1 / 500,
                      sampler=VariedBlocks.Config(draw="even", blocks=BlockMask.Config(least=4, fill="exact"))),
        stages=(Stage(objective=DINOv2.losses, steps=500 * epoch, batch_size=3072, optim=RisingDecay(
            lr=lr, weight_decay=0.04, final_decay=0.2, warmup=80 * epoch, clip=3.0, final=1e-6 / lr,
            lr_scale=(("backbone.patch.*", 0.2),))),))


def high() -> Preset:
    """The last phase: 10,000 steps at 518 px (section 4), from `paper`."""
    base = paper()
    changes = {f"feed.views.{i}.size": 518 for i in (0, 1)} | {"feed.image.size": 518, "config.backbone.image_size": 518, "stages.0.steps": 10_000,
                                                              "stages.0.optim.warmup": 0}
    return base.but(starts=(Start(into="", from_="dinov2", preset="paper"),), **changes)


def distilled() -> Preset:
    """ViT-S/14 from the frozen ViT-g (section 5): the guide's heads make the targets, nothing is masked or dropped, its average is what is used."""
    giant, small = paper(), tower(224, 14, 384, 12, 6)
    head = giant.config.projector.but(into=384, bottleneck=256)  # type: ignore[attr-defined]
    made = config(small, 131_072, 2048, 256, Teacher.Config(momentum=0.994, final=1.0, mode="eval"), guide=giant.config.backbone,  # type: ignore[attr-defined]
                  guide_head=giant.config.projector)  # type: ignore[attr-defined]
    return giant.but(config=made.but(projector=head, patch_head=head), starts=tuple(
        Start(into=f"guide.{n}", from_="dinov2", take=f"teacher.module.{n}", preset="paper") for n in ("backbone", *SHARED)),
        stages=(giant.stages[0].but(objective=DINOv2.learn_from_guide, trainable=("backbone.*", *(f"{n}.*" for n in SHARED))),))


def features() -> Preset:
    """A published tower alone, as released at 518 px: nothing to train on."""
    base = paper().config.but(backbone=tower(518, 14, 384, 12, 6), projector=Nothing.Config(), patch_head=None, teacher=None, reads="student",
                              centre=None, patch_centre=None)
    return paper().but(config=base, **{"feed.image.size": 224})


def features_registers() -> Preset:
    """The same with four registers (Darcet et al. 2024)."""
    return features().but(**{"config.backbone": tower(518, 14, 384, 12, 6, registers=4).but(resize="antialias")})
