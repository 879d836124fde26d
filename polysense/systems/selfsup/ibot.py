"""iBOT: a student says of hidden patches what its own moving average says of them unhidden, and of every crop what that says of the other crops.

    L_cls = mean over large crops i of the teacher and crops j != i of the student of H(P_t(cls x_i), P_s(cls x_j))           (equation 3, DINO's)
    L_mim = mean over large crops u of the mean over hidden patches k of H(P_t(patch_k u), P_s(patch_k masked u))             (equation 2)
    L = L_cls + L_mim

P = softmax(g / tau), the teacher's after a running centre is taken off. One head judges the class token and the patches, so that the teacher, its
softmax the visual words, is a tokenizer that learns beside the student: there is no first stage. Half of the large crops are masked by blocks, each
by a ratio of its own, the teacher sees them whole; small crops are never masked and have no patch term. The student's mask token has no counterpart
in the teacher.
"""
from dataclasses import dataclass

from polysense.archetypes.self_distilled import SelfDistilled
from polysense.base.card import Card
from polysense.base.plan import CropFeed, RisingDecay
from polysense.base.system import Batch, ImagePlan, Losses, Preset, Stage, ViewPlan, final
from polysense.mechanisms.centre import Centre
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.mechanisms.sinkhorn import Sinkhorn
from polysense.mechanisms.teacher import Teacher
from polysense.mechanisms.varied_mask import VariedBlocks
from polysense.nn.head import Nothing
from polysense.nn.prototypes import Prototypes
from polysense.objectives.twin import distil_ce, masked_ce
from polysense.towers.shapes import plain_vit
from polysense.weights import ibot_bytedance

card = Card(
    name="iBOT", paper="Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, ICLR 2022",
    arxiv="2111.07832", year=2022, says="Learns pictures without labels by telling hidden patches as its own average tells them.",
    needs=("views", "crops"), can=("encode_image", "attend"), official="bytedance/ibot",
)

PARAMETERS = 29_272_576                      # ViT-S/16 21,665,664, its head of 8,192 outputs 7,606,528, the mask token 384

weights = {"bytedance": ibot_bytedance.LAYOUT}


@final
class IBOT(SelfDistilled):
    @dataclass(frozen=True, kw_only=True)
    class Config(SelfDistilled.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        heard = self.hear(batch)
        return Losses(distil=distil_ce(heard.student, heard.target, self.student_temperature),
                      patches=masked_ce(heard.patches, heard.patch_target, heard.mask, self.student_temperature)).keeping(**heard.keep)


IBOT.choices = {
    "centre": {
        "mean": lambda p: p,
        "sinkhorn": lambda p: p.but(**{"config.centre": Sinkhorn.Config(), "config.patch_centre": Sinkhorn.Config()}),
        "none": lambda p: p.but(**{"config.centre.momentum": 1.0, "config.patch_centre.momentum": 1.0})},
    "masking": {"blocks": lambda p: p, "none": lambda p: p.but(**{"config.sampler.share": 0.0})}}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny() -> Preset:
    view, head = ViewPlan(size=32, scale=(0.4, 1.0), flip=0.5, jitter=0.5, jitter_by=(0.3, 0.0, 0.0, 0.0)), 256
    return Preset(
        data="scenes:single",
        feed=CropFeed(image=ImagePlan(size=32, mean=MEAN, std=STD), views=(view, view), crops=(view.but(size=16, scale=(0.1, 0.4)),) * 2),
        config=IBOT.Config(
            backbone=plain_vit(32, 4, 96, 4, 3), projector=Prototypes.Config(into=96, out=head, hidden=192, bottleneck=64), reads="teacher",
            teacher=Teacher.Config(momentum=0.99, final=1.0, mode="eval"), centre=Centre.Config(width=head), patch_centre=Centre.Config(width=head),
            sampler=VariedBlocks.Config(blocks=BlockMask.Config(least=4, fill="exact")), still=0.02),
        stages=(Stage(objective=IBOT.losses, steps=600, batch_size=64,
                      optim=RisingDecay(lr=1e-3, weight_decay=0.04, final_decay=0.4, warmup=60, clip=3.0)),))


def paper() -> Preset:
    """ViT-S/16, 800 epochs of batch 1024, ten small crops, 8,192 outputs (section 4.1 and the released arguments)."""
    epoch, base = 1_281_167 // 1024, ViewPlan(size=224, scale=(0.25, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.2, 0.1), grey=0.2)
    return Preset(
        data="imagenet1k",
        feed=CropFeed(image=ImagePlan(size=224, mean=MEAN, std=STD), views=(base.but(blur=1.0), base.but(blur=0.1, solarize=0.2)),
                      crops=(base.but(size=96, scale=(0.05, 0.25), blur=0.5),) * 10),
        config=IBOT.Config(
            backbone=plain_vit(224, 16, 384, 12, 6).but(**{"body.drop_path": 0.1}), projector=Prototypes.Config(into=384, out=8192), reads="teacher",
            teacher=Teacher.Config(momentum=0.996, final=1.0, mode="eval"), centre=Centre.Config(width=8192),
            patch_centre=Centre.Config(width=8192), warming=30 / 800, still=1 / 800),
        stages=(Stage(objective=IBOT.losses, steps=800 * epoch, batch_size=1024,
                      optim=RisingDecay(lr=5e-4 * 1024 / 256, weight_decay=0.04, final_decay=0.4, warmup=10 * epoch, clip=3.0, final=1e-6 / 2e-3)),))


def features() -> Preset:
    """The published teacher's backbone alone: nothing to train on."""
    return paper().but(config=paper().config.but(projector=Nothing.Config(), teacher=None, reads="student", centre=None, patch_centre=None))
