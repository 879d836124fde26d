"""BEVT: BERT for videos. One trunk names the visual tokens of hidden patches of pictures and of hidden tubes of clips.

Stage 1 is BEiT's task on pictures with a Swin in place of the ViT. Stage 2 starts from it and takes a picture and a clip in every step:

    L = CE(codes of hidden places of the picture) + CE(codes of hidden places of all frames of the clip)          (equation 3, weight 1 each)

Both pass the same blocks: a picture is a clip of one time, looked at through the position biases of no offset in time. Apart are the way in (4x4
squares, 2x4x4 cubes) and the way out (the last map, enlarged by a transposed convolution, beside the one before it); the norm behind it and the
classifier are one. What clips need is inflated from what pictures have learned, at the start of stage 2. Half of the 14x14 places of a frame are
hidden block by block, the same ones over a run of half to all of the times, which may wrap around; the mask is repeated to the finer grid of
patches, where one learned token stands in for what is hidden. A frozen tokenizer gives the codes of every frame, and the mask holds for both frames
of a time. Where the clips bring no pictures, `--data "clips?beside=photographs"` does.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import ClipPlan
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, SidesPlan, Spec, Stage, Start, System, VideoPlan, ViewPlan, final
from polysense.decoders.codes import CodeTarget
from polysense.decoders.dvae import DVAECodec, DVAEEncoder
from polysense.decoders.two_streams import TwoStreams
from polysense.decoders.vq_codec import small_codec
from polysense.mechanisms.mask_sampler import BlockMask
from polysense.mechanisms.span_mask import SpanMask
from polysense.nn.build import build
from polysense.objectives.codes import masked_ce
from polysense.towers.swin3d import Swin3D
from polysense.weights import bevt as layouts

card = Card(
    name="BEVT", paper="Wang et al., BEVT: BERT Pretraining of Video Transformers, CVPR 2022",
    arxiv="2112.01529", year=2022, says="Learns pictures and videos without labels by naming the visual tokens of what is hidden in both.",
    needs=("image", "video|image"), can=("encode_image", "encode_video"), official="xyzforever/BEVT",
)

PARAMETERS = 163_465_288                     # trunk 87.6M, ways out 22.0M, encoder of the tokenizer 53.8M; no published total

weights = {"torchvision": layouts.TORCHVISION, "mmaction": layouts.MMACTION}


@final
class BEVT(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        encoder: Swin3D.Config
        target: CodeTarget.Config
        decoder: TwoStreams.Config = field(default_factory=TwoStreams.Config)
        image_mask: BlockMask.Config
        video_mask: SpanMask.Config

    def __init__(self, c: Config):
        super().__init__()
        self.encoder, self.target = c.encoder.build(), c.target.build()
        self.decoder: TwoStreams = build(c.decoder, into=c.encoder.width, out=c.target.width, stretch=c.encoder.patch[0])
        self.image_mask, self.video_mask = c.image_mask.build(), c.video_mask.build()
        self.token = nn.Parameter(torch.randn(1, 1, c.encoder.base) * 0.02)

    def after_start(self) -> None:
        """What a Start brought of pictures becomes the beginning of clips."""
        self.encoder.inflate()

    def maps(self, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """pixels with what mask [B,T,h,w] says hidden -> the map before the last, and the last, as the blocks leave them."""
        before, last = self.encoder.features(pixels, (mask, self.token))[-2:]
        return before, last

    def named(self, features: Tensor) -> Tensor:
        """What rose from the maps [...,D] -> logits [...,K]: one norm, the trunk's, and one classifier for both streams (released code)."""
        return self.decoder.classify(self.encoder.norm(features))

    def name_picture(self, image: Tensor, mask: Tensor) -> Tensor:
        """image [B,3,H,W], mask [B,h,w] (True is hidden) -> logits [B,h,w,K]."""
        return self.named(self.decoder.of_picture(*self.maps(image, mask[:, None])))

    def name_clip(self, video: Tensor, mask: Tensor) -> Tensor:
        """video [B,F,3,H,W], mask [B,T,h,w] -> logits [B,F,h,w,K] of every frame."""
        return self.named(self.decoder.of_clip(*self.maps(video, mask)))

    def codes(self, frames: Tensor) -> Tensor:
        """frames [B,3,H,W] or [B,F,3,H,W] -> their codes [B,h,w] or [B,F,h,w]. UserError where the tokenizer's grid is not that of the answers."""
        flat = frames.flatten(0, -4)
        ids, side = self.target.ids(flat), self.encoder.stride // 2
        if ids.shape[1:] != (flat.shape[2] // side, flat.shape[3] // side):
            raise UserError(f"{ids.shape[1]}x{ids.shape[2]} codes of {flat.shape[2]}x{flat.shape[3]} pixels",
                            f"this trunk answers every {side} pixels")
        return ids.unflatten(0, frames.shape[:-3])

    def look(self, batch: Batch) -> Losses:
        """Stage 1: pictures alone."""
        ids = self.codes(batch["image"])
        mask = self.image_mask(len(ids), ids.shape[1:], ids.device).mask.view_as(ids)
        return Losses(image=masked_ce(self.name_picture(batch["image"], mask), ids, mask))

    def watch(self, batch: Batch) -> Losses:
        """Clips alone."""
        if "video" not in batch:
            raise UserError("these data have no clips", "give data of clips, or train the preset of pictures")
        ids = self.codes(batch["video"])
        t = ids.shape[1] // self.encoder.times
        mask = self.video_mask(len(ids), (t, *ids.shape[2:]), ids.device).mask.view(len(ids), t, *ids.shape[2:])
        every = mask.repeat_interleave(self.encoder.times, 1)
        return Losses(video=masked_ce(self.name_clip(batch["video"], mask), ids, every))

    def losses(self, batch: Batch) -> Losses:
        """Stage 2: both in one step."""
        return Losses(**self.look(batch), **self.watch(batch))

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: the mean of the last map, nothing hidden."""
        if image.ndim != 4:
            raise UserError(f"an image tensor of shape {list(image.shape)}", "it is [B,3,H,W]")
        return F.normalize(self.encoder(image).pooled.float(), dim=-1)

    def encode_video(self, video: Tensor) -> Tensor:
        """video [B,F,3,H,W] -> [B,D], unit norm: the mean of the last map, nothing hidden."""
        if video.ndim != 5:
            raise UserError(f"a video tensor of shape {list(video.shape)}", "it is [B,F,3,H,W]")
        return F.normalize(self.encoder(video).pooled.float(), dim=-1)


MEAN, STD, HALF = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
OF_PICTURES = ("encoder.still.*", "encoder.still_norm.*", "encoder.stages.*", "encoder.norm.*", "decoder.still.*", "decoder.classify.*", "token")
LEARNS = ("encoder.*", "decoder.*", "token")


def config(encoder: Swin3D.Config, target: CodeTarget.Config, hidden: int, least: int) -> BEVT.Config:
    frame = BlockMask.Config(hidden=hidden, least=least, fill="exact")
    return BEVT.Config(encoder=encoder, target=target, image_mask=frame, video_mask=SpanMask.Config(frame=frame))


def tiny_pictures() -> Preset:
    """Stage 1 at the size of `tiny`."""
    target = CodeTarget.Config(codec=small_codec(), size=32, mean=MEAN, std=STD, codec_mean=HALF, codec_std=HALF)
    encoder = Swin3D.Config(patch=(2, 4, 4), base=48, depths=(2, 2), heads=(2, 4), window=(4, 4, 4))
    return Preset(
        data="scenes:clips?size=32&frames=8", config=config(encoder, target, 32, 6),
        feed=Feed(image=ImagePlan(size=32, mean=MEAN, std=STD), train_image=ViewPlan(size=32, scale=(0.6, 1.0), flip=0.5), video=VideoPlan(frames=8)),
        starts=(Start(into="target.codec", from_="vq_vae", take="codec", preset="small"),),
        stages=(Stage(name="pictures", objective=BEVT.look, trainable=OF_PICTURES, steps=300, batch_size=32,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=30, clip=3.0)),))


def after(preset: str) -> tuple[Start, ...]:
    """What stage 2 takes from stage 1."""
    return tuple(Start(into=part, from_="bevt", take=part, preset=preset) for part in ("encoder", "decoder", "token"))


def tiny() -> Preset:
    """Stage 2 on clips of 8 frames of 32 px; codes of a VQ-VAE, 8x8 a frame, of which half are hidden."""
    base = tiny_pictures()
    return base.but(
        starts=(*base.starts, *after("tiny_pictures")),
        stages=(Stage(name="joint", objective=BEVT.losses, trainable=LEARNS, steps=300, batch_size=16,
                      optim=Optim(lr=1e-3, weight_decay=0.05, warmup=30, clip=3.0)),))


def paper_pictures() -> Preset:
    """Stage 1: Swin-B on ImageNet-1k, 800 epochs of batch 2048; DALL-E's tokenizer at 112 px."""
    epoch = 1_281_167 // 2048
    target = CodeTarget.Config(codec=DVAECodec.Config(encoder=DVAEEncoder.Config(codes=8192), decoder=None), size=112, mean=MEAN, std=STD)
    return Preset(
        data="imagenet1k", config=config(Swin3D.Config(drop_path=0.3), target, 98, 16),
        feed=Feed(image=ImagePlan(size=224, mean=MEAN, std=STD), train_image=ViewPlan(
            size=224, scale=(0.2, 1.0), flip=0.5, jitter=1.0, jitter_by=(0.4, 0.4, 0.4, 0.0)), video=VideoPlan(frames=16, sample="stride", stride=8)),
        starts=(Start(into="target.codec.encoder", from_="dalle_dvae", take="codec.encoder", preset="paper"),),
        stages=(Stage(name="pictures", objective=BEVT.look, trainable=OF_PICTURES, steps=800 * epoch, batch_size=2048,
                      optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=10 * epoch, clip=3.0)),))


def paper() -> Preset:
    """Stage 2: pictures and clips of Kinetics-400 together, 150 epochs of 256 clips of 16 frames, every eighth, squares of 224 px cut anywhere of a
    shorter side of 256 to 320. The released run has eight times as many pictures as clips in a step; here a batch holds as many of each."""
    base, epoch, view = paper_pictures(), 240_000 // 256, SidesPlan(size=224, sides=(256, 320), flip=0.5)
    return base.but(**{"feed.train_image": view.but(jitter=1.0, jitter_by=(0.4, 0.4, 0.4, 0.0)), "feed.video": ClipPlan(
        frames=16, sample="stride", stride=8, view=view)}).but(
        data="kinetics400", starts=(*base.starts, *after("paper_pictures")),
        stages=(Stage(name="joint", objective=BEVT.losses, trainable=LEARNS, steps=150 * epoch, batch_size=256,
                      optim=Optim(lr=5e-4, weight_decay=0.05, warmup=10 * epoch, clip=3.0)),))
