"""VideoMAE: hide nine tenths of a clip, the same places in every frame, and draw them.

A clip of 16 frames is cut into cubes of 2x16x16; one random spatial mask of int(0.9 x 196) cells holds for the whole clip (a tube), because a cell
hidden in one frame only could be copied from the next. The encoder, joint attention over space and time without a class token, reads the visible
cubes; the decoder gets them, and a learned token for every hidden one, each with its position, in that order.

    L = mean over hidden cubes i of | decoder(encoder(x_visible))_i - t_i |^2                                     (equation 1)

with t_i the pixels of cube i in [0, 1], each colour channel less its mean and divided by its deviation. Queries and values have a bias, keys have
none. For recognition the mean of the tokens passes a norm and a dense layer.
"""
from dataclasses import dataclass, field

from torch import Tensor, nn

from polysense.archetypes.masked_model import MaskedModel
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import ClipPlan, VideoPlan
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Part, Preset, SidesPlan, Spec, Stage, ViewPlan, final
from polysense.decoders.mae import MAEDecoder
from polysense.decoders.pixels import PixelTarget
from polysense.mechanisms.mask_sampler import Masking, TubeMask
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Nothing
from polysense.nn.init import XavierInit
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.classify import softmax_ce
from polysense.objectives.masked import masked_mse
from polysense.towers.video_vit import VideoViT
from polysense.weights import videomae_hf

card = Card(
    name="VideoMAE", paper="Tong et al., VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training, 2022",
    arxiv="2203.12602", year=2022, says="Learns videos without labels by drawing the nine tenths of them that it is not shown.",
    needs=("video",), can=("encode_video", "classify_video"), official="MCG-NJU/VideoMAE",
)

PARAMETERS = 94_210_944                      # ViT-B 86,227,200 (no bias of the keys), decoder 7,983,744; the two position tables are not counted

weights = {"hf": videomae_hf.LAYOUT}


class NormHead(Part):
    """norm, then a dense layer: fine-tuning's head."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        into: int
        out: int
        eps: float = 1e-5

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(c.into, eps=c.eps), nn.Linear(c.into, c.out)
        nn.init.trunc_normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


@final
class VideoMAE(MaskedModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(MaskedModel.Config):
        head: Spec = field(default_factory=Nothing.Config)          # a NormHead.Config for recognition

    def __init__(self, c: Config):
        super().__init__(c)
        self.head = c.head.build()

    def losses(self, batch: Batch) -> Losses:
        """Pre-training."""
        video = batch["video"]
        return Losses(pixels=masked_mse(*self.pairs(video, self.masking(video))))

    def recognise(self, batch: Batch) -> Losses:
        """Fine-tuning on the classes of clips."""
        return Losses(label=softmax_ce(self.classify_video(batch["video"]), batch["label"]))

    def classify_video(self, video: Tensor) -> Tensor:
        """video [B,F,3,H,W] -> logits [B,C]. UserError for a system without a head."""
        if isinstance(self.head, Nothing):
            raise UserError("this VideoMAE has no classes", "fine-tune it with a head")
        return self.head(self.encoder(video).pooled).float()

    def encode_video(self, video: Tensor) -> Tensor:
        """video [B,F,3,H,W] -> [B,D], unit norm: the mean of all tokens, no cube hidden."""
        return self.features(video)

    def draw(self, video: Tensor, masking: Masking | None = None) -> Tensor:
        """video [B,F,3,H,W] -> the clip with its hidden cubes as drawn; nothing of what is hidden is read."""
        masking = masking or self.masking(video)
        drawn = self.decoder(self.see(video, masking), masking)
        return self.target.paint(video, masking, drawn, self.encoder.grid_of(video))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def body(width: int, depth: int, heads: int, eps: float = 1e-6, last: float = 1e-6) -> Transformer.Config:
    block = PreNorm.Config(norm=LayerNorm.Config(eps=eps), attn=Attention.Config(bias="q v out"))
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=LayerNorm.Config(eps=last), init=XavierInit.Config(), block=block)


def preset(size: int, frames: int, patch: int, ratio: float, encoder: Transformer.Config, decoder: Transformer.Config, clip: VideoPlan, data: str,
           stage: Stage) -> Preset:
    return Preset(
        data=data, stages=(stage,), feed=Feed(image=ImagePlan(size=size, mean=MEAN, std=STD), video=clip),
        config=VideoMAE.Config(
            encoder=VideoViT.Config(image_size=size, frames=frames, patch=patch, body=encoder), sampler=TubeMask.Config(ratio=ratio),
            decoder=MAEDecoder.Config(body=decoder, prefix=0, bias="head"),
            target=PixelTarget.Config(patch=patch, frames=2, norm="channel", mean=MEAN, std=STD)))


def tiny() -> Preset:
    return preset(32, 16, 8, 0.75, body(96, 4, 3), body(64, 2, 2), VideoPlan(frames=16), "scenes:clips?size=32&frames=16", Stage(
        objective=VideoMAE.losses, steps=400, batch_size=64, optim=Optim(lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=40, clip=1.0)))


def paper() -> Preset:
    """ViT-B on Kinetics-400, 16 frames of stride 4 cut anywhere at up to three halves of their size, 1600 epochs of 2048 clips as the released script
    has it (the paper's table says 1024)."""
    epoch, clip = 240_000 // 2048, ClipPlan(frames=16, sample="stride", stride=4, view=SidesPlan(size=224, sides=(224, 340)))
    return preset(224, 16, 16, 0.9, body(768, 12, 12), body(384, 4, 6, last=1e-5), clip, "kinetics400", Stage(
        objective=VideoMAE.losses, steps=1600 * epoch, batch_size=2048,
        optim=Optim(lr=1.5e-4 * 2048 / 256, betas=(0.9, 0.95), weight_decay=0.05, warmup=40 * epoch)))


def finetune() -> Preset:
    """The encoder on the 400 classes of Kinetics: mean of the tokens, norm, dense layer, layer decay 0.75, 75 epochs of 512 clips, two of every video
    side by side."""
    base, epoch = paper(), 240_000 // 512
    encoder = base.config.encoder.but(body=body(768, 12, 12).but(norm=None, drop_path=0.1))  # type: ignore[attr-defined]
    return base.but(
        config=base.config.but(encoder=encoder, decoder=Nothing.Config(), head=NormHead.Config(into=768, out=400)),
        stages=(Stage(objective=VideoMAE.recognise, trainable=("encoder.*", "head.*"), steps=75 * epoch, batch_size=512,
                      optim=Optim(lr=1e-3, weight_decay=0.05, warmup=5 * epoch, layer_decay=0.75)),),
        **{"feed.video.repeat": 2, "feed.video.view": ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5)})
