"""MaskFeat: hide blocks of patches, and say which way the edges in them run.

As in BEiT, about 40 percent of the patches are hidden block by block, their embeddings replaced by one learned token; all tokens pass a plain ViT
with learned positions, and one linear layer names a feature t_i of every hidden patch of the picture as it is:

    L = mean over hidden patches i of | W h_i + b - t_i |^2                                                       (section 3.1)

The feature that does best is the oldest: histograms of oriented gradients. Of each colour channel, gradients by [1 2 1]^T [1 0 -1] and its
transpose; each pixel of a cell of 8x8 gives its magnitude to one of nine bins of undirected angle; each cell's nine numbers are brought to length
one, which matters (table 9). A patch of 16 px holds 2x2 cells: 3 x 9 x 4 = 108 numbers. Nothing is learned for it and no second network runs.
With `target` a FeatureTarget the same model predicts what a frozen DINO (or DeiT) says of the patches.

Of clips (section 4.3) the encoder is an MViTv2, whose last stage keeps the grid of 14 x 14; boxes of space and time are hidden, and each hidden cube
is asked for the histograms of one frame, the first of its two.
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.archetypes.masked_model import MaskedModel
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import ClipPlan, VideoPlan
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, ViewPlan, final
from polysense.decoders.codes import CodeHead
from polysense.decoders.features import FeatureTarget
from polysense.decoders.hog import FramesHOG, HOGTarget
from polysense.mechanisms.cube_mask import CubeMask
from polysense.mechanisms.mask_sampler import BlockMask, FillHidden
from polysense.objectives.masked import masked_mse
from polysense.towers.mvit import MViT
from polysense.towers.shapes import plain_vit
from polysense.towers.vit import ViT
from polysense.weights import maskfeat

card = Card(
    name="MaskFeat", paper="Wei et al., Masked Feature Prediction for Self-Supervised Visual Pre-Training, CVPR 2022",
    arxiv="2112.09133", year=2022, says="Learns pictures or clips without labels by saying which way the edges in hidden patches run.",
    needs=("image|video", "video|image"), can=("encode_image",), official="facebookresearch/SlowFast",
)

PARAMETERS = 85_882_476                      # ViT-B/16 with its mask token 85.8M, and the head 768 x 108

weights = {"slowfast": maskfeat.SLOWFAST, "slowfast_video": maskfeat.SLOWFAST_VIDEO}

MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)            # of the authors' video models
PICTURES = {"feed.image.mean": (0.485, 0.456, 0.406), "feed.image.std": (0.229, 0.224, 0.225)}       # and of those of pictures
LEARNS = ("encoder.*", "hide.*", "decoder.*")


@final
class MaskFeat(MaskedModel):
    inputs = ("image",)

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        image = batch["image"]
        return Losses(features=masked_mse(*self.pairs(image, self.masking(image))))

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of all patch tokens, none hidden."""
        return self.features(image)


@final
class MaskFeatVideo(MaskedModel):
    """Of clips."""

    inputs = ("video",)

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        if "video" not in batch:
            raise UserError("these data have no clips", "give data of clips, or train a preset of pictures")
        video = batch["video"]
        return Losses(features=masked_mse(*self.pairs(video, self.masking(video))))

    def encode_video(self, video: Tensor) -> Tensor:
        """video [B,F,3,H,W] -> [B,D], unit norm: the mean of all cubes, none hidden."""
        return self.features(video)


def preset(size: int, encoder: ViT.Config, hidden: int, least: int, target: Spec, data: str, stage: Stage) -> Preset:
    return Preset(
        data=data, stages=(stage,),
        feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), train_image=ViewPlan(size=size, scale=(0.5, 1.0), flip=0.5)),
        config=MaskFeat.Config(encoder=encoder, sampler=BlockMask.Config(hidden=hidden, least=least), hide=FillHidden.Config(),
                               decoder=CodeHead.Config(), target=target))


def tiny() -> Preset:
    """64 px in patches of 8, cells of 4."""
    return preset(64, plain_vit(64, 8, 96, 4, 3, pool="mean"), 26, 6, HOGTarget.Config(patch=8, cell=4), "scenes", Stage(
        objective=MaskFeat.losses, trainable=LEARNS, steps=600, batch_size=64, optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=60, clip=1.0)))


def tiny_dino() -> Preset:
    """The features of `dino` tiny in place of histograms; it reads the same crop at 32 px in patches of 4."""
    base = tiny()
    target = FeatureTarget.Config(tower=plain_vit(32, 4, 96, 4, 3), width=96, size=32, mean=MEAN, std=STD, tower_mean=(0.485, 0.456, 0.406),
                                  tower_std=(0.229, 0.224, 0.225), norm="layer")
    return base.but(starts=(Start(into="target.tower", from_="dino", take="teacher.module.backbone"),), **{"config.target": target})


def paper() -> Preset:
    """ViT-B/16 on ImageNet-1k, 1600 epochs of batch 2048 (appendix, table 14)."""
    epoch = 1_281_167 // 2048
    return preset(224, plain_vit(224, 16, 768, 12, 12, pool="mean"), 78, 15, HOGTarget.Config(patch=16, cell=8), "imagenet1k", Stage(
        objective=MaskFeat.losses, trainable=LEARNS, steps=1600 * epoch, batch_size=2048,
        optim=Optim(lr=2e-4 * 2048 / 256, weight_decay=0.05, warmup=30 * epoch, clip=0.02, final=1e-6 / 1.6e-3))).but(**PICTURES)


def vit_l_16() -> Preset:
    """ViT-L/16."""
    return paper().but(**{"config.encoder": plain_vit(224, 16, 1024, 24, 16, pool="mean")})


def of_clips(encoder: MViT.Config, clip: VideoPlan, data: str, stage: Stage) -> Preset:
    patch = 4 << len(encoder.halved)
    return Preset(
        data=data, stages=(stage,), feed=Feed(image=ImagePlan(size=encoder.image_size, mean=MEAN, std=STD), video=clip),
        config=MaskFeatVideo.Config(encoder=encoder, sampler=CubeMask.Config(), hide=FillHidden.Config(), decoder=CodeHead.Config(),
                                    target=FramesHOG.Config(patch=patch, cell=patch // 2)))


def tiny_video() -> Preset:
    """16 frames of 32 px; a last grid of 8 x 4 x 4, boxes on half of that, cells of 4."""
    encoder = MViT.Config(image_size=32, base=32, depth=4, doubled=(1, 3), halved=(1,), reach=4, widens="mlp")
    return of_clips(encoder, VideoPlan(frames=16), "scenes:clips?size=32&frames=16", Stage(
        objective=MaskFeatVideo.losses, trainable=LEARNS, steps=400, batch_size=32, optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=40, clip=1.0)))


def mvit_s() -> Preset:
    """MViTv2-S on Kinetics-400: 16 frames of stride 4, 300 epochs of 512 clips, 1e-4 for each 32 of them (released settings)."""
    epoch, clip = 240_000 // 512, ClipPlan(frames=16, sample="stride", stride=4, view=ViewPlan(size=224, scale=(0.5, 1.0), flip=0.5))
    return of_clips(MViT.Config(halved=(1, 3), widens="mlp"), clip, "kinetics400", Stage(
        objective=MaskFeatVideo.losses, trainable=LEARNS, steps=300 * epoch, batch_size=512,
        optim=Optim(lr=1e-4 * 512 / 32, weight_decay=0.05, warmup=10 * epoch, clip=0.02, final=1e-6 / 1.6e-3)))


def mvit_l() -> Preset:
    """MViTv2-L, 800 epochs."""
    small = mvit_s()
    encoder = MViT.Config(base=144, depth=48, heads=2, doubled=(2, 8, 44), halved=(2, 8), widens="mlp")
    return small.but(**{"config.encoder": encoder, "stages.0.steps": small.stages[0].steps // 300 * 800})
