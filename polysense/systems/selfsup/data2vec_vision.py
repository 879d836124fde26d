"""data2vec for pictures: say of the hidden patches what a slowly moving copy of the model, which sees them, makes of them in the end.

The student is BEiT's: about 60 percent of the patches are hidden block by block, their embeddings replaced by one learned token, positions known
through relative biases. The teacher is an average of the student, theta_t <- m theta_t + (1 - m) theta_s, and reads the same crop, nothing
hidden. What it says of a patch is no pixel and no code but a contextual feature, from its last K blocks:

    y_t = LN( (1/K) sum over the last K blocks l of LN(a_t^l) )                                                   (section 3.3)
    L = mean over hidden patches of  d^2 / (2 beta) where |d| <= beta, |d| - beta / 2 beyond,   d = W f_t(x) + b - y_t    (equation 3)

LN has no parameters. Averaging layers and normalising them is what keeps the targets from becoming constant: nothing else pushes features apart.
`spread` is the deviation of the targets over patches, to be watched. The target builder knows nothing of pictures but the encoder's `features`.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.masked_model import MaskedModel
from polysense.base.card import Card
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, ViewPlan, final
from polysense.decoders.codes import CodeHead
from polysense.mechanisms.followed import FollowedTarget
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden
from polysense.mechanisms.teacher import Teacher
from polysense.objectives.regress import masked_smooth_l1
from polysense.towers.beit import BeitTower, shared_bias
from polysense.weights import data2vec_vision

card = Card(
    name="data2vec (vision)",
    paper="Baevski et al., data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language, ICML 2022",
    arxiv="2202.03555", year=2022, says="Learns pictures without labels by predicting its own average's features of hidden patches.",
    needs=("image",), can=("encode_image",), official="facebookresearch/data2vec_vision",
)

PARAMETERS = 86_256_720                      # ViT-B/16 with its mask token 85.7M and the head 768 x 768 (the teacher, as large, has no gradient)

weights = {"hf": data2vec_vision.HF}

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@final
class Data2VecVision(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        beta: float = 2.0                    # where the loss turns from squares to absolute values

    def __init__(self, c: Config):
        super().__init__(c)
        self.beta = c.beta

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        return Losses(features=masked_smooth_l1(*self.pairs(image, self.masking(image)), self.beta))

    def spread(self, image: Tensor) -> Tensor:
        """Deviation of the targets over all patches of a batch, mean over channels: 1 at most, near 0 where the teacher says the same of all."""
        with torch.no_grad():
            return self.target.whole(image).flatten(0, 1).std(0).mean()

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of all patch tokens of the student, none hidden."""
        return self.features(image)


def preset(size: int, encoder: BeitTower.Config, hidden: int, least: int, target: FollowedTarget.Config, data: str, scale: float,
           stage: Stage) -> Preset:
    view = ViewPlan(size=size, scale=(scale, 1.0), flip=0.5, jitter=0.8, jitter_by=(0.4, 0.4, 0.4, 0.0))
    return Preset(
        data=data, stages=(stage,), feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), train_image=view),
        config=Data2VecVision.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least), hide=FillHidden.Config(),
                                     decoder=CodeHead.Config(), target=target))


def tiny() -> Preset:
    """64 px in patches of 8, the upper two of four blocks; of so few steps the average forgets faster, and branches begin at full scale."""
    return preset(64, shared_bias(64, 8, 96, 4, 3, 1.0), 38, 6, FollowedTarget.Config(
        teacher=Teacher.Config(momentum=0.99, final=0.999, mode="eval"), top=2), "scenes", 0.4, Stage(
            objective=Data2VecVision.losses, steps=600, batch_size=64,
            optim=Optim(lr=1e-3, weight_decay=0.05, warmup=60, clip=3.0, lr_scale=(("*.relative.table", 20.0),))))


def paper() -> Preset:
    """ViT-B/16 on ImageNet-1k, 800 epochs of batch 2048 (section 4.1 and the released command): 120 of 196 patches, decay 0.9998, K = 6;
    the colours of every picture are jittered."""
    epoch = 1_281_167 // 2048
    made = preset(224, shared_bias(224, 16, 768, 12, 12, 1e-4, 0.25), 120, 16, FollowedTarget.Config(), "imagenet1k", 0.08, Stage(
        objective=Data2VecVision.losses, steps=800 * epoch, batch_size=2048, optim=Optim(lr=2e-3, weight_decay=0.05, warmup=10 * epoch, clip=3.0)))
    return made.but(**{"config.encoder.body.block.attn.dropout": 0.05, "feed.train_image.jitter": 1.0})
