"""MAE-ST: hide nine tenths of a clip anywhere in space and time, and draw them.

A clip of 16 frames is cut into cubes of 2x16x16; of the 1568, int(0.1 x 1568) = 156 are drawn uniformly and seen, with no regard for what is space
and what is time. The encoder, a plain ViT with a class token, computes these alone; the positions of space and of time are learned apart, added up,
and given to the cubes that are left. A narrow decoder with positions and a class token of its own gets a learned token in every hidden place.

    L = mean over hidden cubes i of | decoder(encoder(x_visible))_i - t_i |^2                                     (section 3)

with t_i the pixels of ONE frame of cube i, less their mean and divided by their deviation. Clips are as redundant as that: at 90 percent a step costs
a seventh of what it would. Decoding a video then costs more than learning from it, so each that is decoded gives four clips. The only
augmentation is crop and flip.
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.archetypes.masked_model import MaskedModel
from polysense.base.card import Card
from polysense.base.plan import ClipPlan
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, ViewPlan, final
from polysense.decoders.mae import SeparableDecoder
from polysense.decoders.pixels import FramePixels
from polysense.mechanisms.mask_sampler import Masking, RandomMask
from polysense.nn.block import PreNorm
from polysense.nn.init import XavierInit
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.masked import masked_mse
from polysense.towers.video_vit import SeparableVideoViT
from polysense.weights import mae_st

card = Card(
    name="MAE-ST", paper="Feichtenhofer et al., Masked Autoencoders As Spatiotemporal Learners, NeurIPS 2022", arxiv="2205.09113", year=2022,
    says="Learns videos without labels by drawing nine tenths of their patches, hidden anywhere in space and time.",
    needs=("video",), can=("encode_video",), official="facebookresearch/mae_st",
)

PARAMETERS = 317_731_584                     # ViT-L 304,096,256, decoder 13,635,328, positions included

weights = {"official": mae_st.LAYOUT, "slowfast": mae_st.SLOWFAST}

MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


@final
class MAEST(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        pass

    def losses(self, batch: Batch) -> Losses:
        video = batch["video"]
        return Losses(pixels=masked_mse(*self.pairs(video, self.masking(video))))

    def encode_video(self, video: Tensor) -> Tensor:
        """video [B,F,3,H,W] -> [B,D], unit norm: the mean of all cubes, none hidden."""
        return self.features(video)

    def draw(self, video: Tensor, masking: Masking | None = None) -> Tensor:
        """video [B,F,3,H,W] -> the frames that are predicted, [B,said,3,H,W], their hidden patches as drawn; nothing of what is hidden is read."""
        masking = masking or self.masking(video)
        drawn = self.decoder(self.see(video, masking), masking)
        return self.target.paint(video, masking, drawn, self.encoder.grid)


def tower(width: int, depth: int, heads: int) -> Transformer.Config:
    norm = LayerNorm.Config(eps=1e-6)
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=norm, init=XavierInit.Config(), block=PreNorm.Config(norm=norm))


def preset(size: int, frames: int, patch: int, encoder: Transformer.Config, decoder: Transformer.Config, stride: int, norm: str, data: str,
           stage: Stage) -> Preset:
    clip = ClipPlan(frames=frames, sample="stride", stride=stride, repeat=4, view=ViewPlan(size=size, scale=(0.5, 1.0), flip=0.5))
    return Preset(
        data=data, stages=(stage,), feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), video=clip),
        config=MAEST.Config(
            encoder=SeparableVideoViT.Config(image_size=size, frames=frames, patch=patch, body=encoder), sampler=RandomMask.Config(ratio=0.9),
            decoder=SeparableDecoder.Config(body=decoder), target=FramePixels.Config(patch=patch, frames=1, said=frames // 2, norm=norm)))


def tiny() -> Preset:
    """16 of 20 frames of 32 px in cubes of 2x8x8; 12 of 128 are seen."""
    return preset(32, 16, 8, tower(96, 4, 3), tower(64, 2, 2), 1, "none", "scenes:clips?size=48&frames=20", Stage(
        objective=MAEST.losses, steps=400, batch_size=64, optim=Optim(lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=40, clip=1.0)))


def paper() -> Preset:
    """ViT-L on Kinetics-400, 16 frames of stride 4, 1600 effective epochs of 512 clips, normalised pixels (table 8; warm-up as released,
    5 of 100)."""
    steps = 1600 * 240_000 // 512
    return preset(224, 16, 16, tower(1024, 24, 16), tower(512, 4, 16), 4, "patch", "kinetics400", Stage(
        objective=MAEST.losses, steps=steps, batch_size=512,
        optim=Optim(lr=1.6e-3 * 512 / 256, betas=(0.9, 0.95), weight_decay=0.05, warmup=steps // 20, clip=0.02)))


def vit_b_16() -> Preset:
    """ViT-B."""
    return paper().but(**{"config.encoder.body": tower(768, 12, 12)})


def vit_h_14() -> Preset:
    """ViT-H, patches of 14."""
    return paper().but(**{"config.encoder.body": tower(1280, 32, 16), "config.encoder.patch": 14, "config.target.patch": 14})
