"""ImageBind: pictures bind all senses into one space, though no two other senses were ever seen together.

Image and text towers are CLIP's and frozen. Every other modality M gets a transformer of its own, trained on pairs (image, M) alone:

    q = norm(head(vision(image))),   k = norm(head_M(tower_M(m))),   loss = (CE(s_M q k^t) + CE(s_M k q^t)) / 2      (equation 1)

with a fixed temperature s_M. Since CLIP has put pictures and texts into one space, sound and text meet in it without a single pair of theirs:
the alignment emerges. A vector of M leaves the released model multiplied by s_M (`scaled`); `encode_*` returns unit vectors, whose sums make
sense ("a sound plus a picture").

Towers: pictures are clips of two equal frames for 2x14x14 cubes; sound is a Kaldi mel spectrogram read like a picture, longer sounds as three
clips that are averaged; depth and heat are planes of one channel; movement is six channels in windows. All but CLIP's have a norm over the
patch embeddings and a learned key and value in every attention.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.archetypes.senses import Bound, SenseSpace
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import AudioPlan, ImagePlan, TextPlan, VideoPlan
from polysense.base.system import Batch, Feed, Losses, Optim, Preset, Spec, Stage, Start, final
from polysense.nn.attention import BiasAttention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear
from polysense.nn.mel import MelSpectrogram, check_audio
from polysense.nn.norm import LayerNorm
from polysense.nn.tokens import ClipTokens, PlaneTokens, WindowTokens
from polysense.nn.transformer import Transformer
from polysense.objectives.contrastive import info_nce
from polysense.towers.audio import audio_vit
from polysense.towers.clip import body as clip_body
from polysense.towers.clip_text import ClipText
from polysense.towers.modal import ModalViT
from polysense.weights import imagebind_official

card = Card(
    name="ImageBind", paper="Girdhar et al., ImageBind: One Embedding Space To Bind Them All, CVPR 2023", arxiv="2305.05665", year=2023,
    says="Puts sound, depth, heat and movement into the space of pictures and texts, learning from pairs with pictures only.",
    needs=("image", "audio|depth|thermal|imu"),
    can=("encode_image", "encode_text", "encode_video", "encode_audio", "encode_depth", "encode_thermal", "encode_imu"),
    official="facebookresearch/ImageBind",
)

PARAMETERS = 1_200_781_057                   # imagebind_huge; the released file, 4.80 GB of float32, holds as many

weights = {"official": imagebind_official.LAYOUT}

SENSES = ("audio", "depth", "thermal", "imu")


@final
class ImageBind(SenseSpace):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: ModalViT.Config
        text: ClipText.Config
        image_head: Spec
        text_head: Spec
        audio: Bound.Config | None = None
        depth: Bound.Config | None = None
        thermal: Bound.Config | None = None
        imu: Bound.Config | None = None
        clip_samples: int = 32_000           # of sound, in one clip: two seconds
        clips: int = 3                       # of a longer sound, evenly over it, averaged

    SENSES = SENSES

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.text = c.vision.build(), c.text.build()
        self.image_head, self.text_head = c.image_head.build(), c.text_head.build()
        self.log_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))                   # of text, CLIP's own
        self.audio, self.depth, self.thermal, self.imu = (b.build() if b else None for b in (c.audio, c.depth, c.thermal, c.imu))
        self.frames = c.vision.tokens.frames  # type: ignore[attr-defined]
        self.clip_samples, self.clips = c.clip_samples, c.clips

    @property
    def scale(self) -> Tensor:
        """exp(log_scale), at most 100."""
        return self.log_scale.exp().clamp(max=100.0)

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """`image` and every other modality of the batch, unit norm [B,D]: what samples meet by."""
        found = [s for s in SENSES if s in batch]
        if not found:
            raise UserError("the batch holds nothing to bind to its pictures", f"give one of {', '.join(SENSES)}")
        with torch.no_grad():
            image = self.encode_image(batch["image"])
        return {"image": image, **{s: getattr(self, f"encode_{s}")(batch[s]) for s in found}}

    def bind(self, seen: dict[str, Tensor]) -> Losses:
        """One symmetric InfoNCE between the pictures and each other modality, each with its own fixed temperature."""
        return Losses(**{s: info_nce(seen["image"], seen[s], self.sense(s).log_scale.exp()) for s in SENSES if s in seen})

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm: a clip that stands still."""
        return F.normalize(self.image_head(self.vision.pooled(self.checked("image", image))).float(), dim=-1)

    def encode_video(self, video: Tensor) -> Tensor:
        """video [B,T,3,H,W] -> [B,D], unit norm: the mean over its clips of two frames; an odd last frame is repeated."""
        lacking = -self.checked("video", video).shape[1] % self.frames
        clips = torch.cat([video, video[:, -1:].expand(-1, lacking, -1, -1, -1)], 1).unflatten(1, (-1, self.frames))
        each = F.normalize(self.image_head(self.vision.pooled(clips.flatten(0, 1))).float(), dim=-1)
        return F.normalize(each.unflatten(0, clips.shape[:2]).mean(1), dim=-1)

    def encode_audio(self, audio: Tensor) -> Tensor:
        """audio [B,S] at 16 kHz -> [B,D], unit norm: one clip, silence behind a shorter one; longer sounds as `clips` clips, averaged."""
        check_audio(audio)
        spare = audio.shape[1] - self.clip_samples
        if spare <= 0:
            return self.sense("audio")(F.pad(audio, (0, -spare)))
        start = torch.linspace(0, spare, self.clips, dtype=torch.float64).round().long().tolist()
        clips = torch.stack([audio[:, s:s + self.clip_samples] for s in start], 1)
        each = self.sense("audio")(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        return F.normalize(each.mean(1), dim=-1)

    def encode_imu(self, imu: Tensor) -> Tensor:
        """imu [B,6,S] -> [B,D], unit norm."""
        return self.sense("imu")(imu)

    def scaled(self, batch: Batch, names: Iterable[str] = ("image", "text", *SENSES)) -> dict[str, Tensor]:
        """What the released model returns: each modality's vectors times its factor, so of norm 1 for pictures, 20 for sound, 5 for depth ...
        Normalise again before adding vectors of different modalities."""
        factor = {"image": torch.ones(()), "text": self.scale}
        return {n: getattr(self, f"encode_{n}")(batch[n]) * (factor[n] if n in factor else self.sense(n).log_scale.exp())
                for n in names if n in batch}


NORM = LayerNorm.Config(eps=1e-6)


def bound(width: int, depth: int, heads: int, dim: int, scale: float, *, drop_path: float = 0.0, dropout: float = 0.0, **tower: Any) -> Bound.Config:
    """A new modality: `tokens` or (for sound) `mel`, `kernel` and `stride`, and the transformer behind them."""
    of = Transformer.Config(width=width, depth=depth, heads=heads, norm=NORM, drop_path=drop_path,
                            block=PreNorm.Config(attn=BiasAttention.Config(), norm=NORM))
    made = ModalViT.Config(body=of, **tower) if "tokens" in tower else audio_vit(of, norm=LayerNorm.Config(), **tower)
    return Bound.Config(tower=made, head=Linear.Config(into=width, out=dim), scale=scale, dropout=dropout)


def clip(size: int, patch: int, image: Transformer.Config, text: Transformer.Config, dim: int, norm: LayerNorm.Config, vocab: int = 49408,
         length: int = 77, end: int | None = None) -> dict[str, Any]:
    """CLIP's two towers, the image tower's patches being cubes."""
    return {"vision": ModalViT.Config(tokens=ClipTokens.Config(size=size, patch=patch), body=image, norm_pre=norm),
            "text": ClipText.Config(vocab=vocab, length=length, body=text, end=end),
            "image_head": Linear.Config(into=image.width, out=dim), "text_head": Linear.Config(into=text.width, out=dim)}


def plane(size: int) -> PlaneTokens.Config:
    """Depth or heat: patches of 16 pixels, apart."""
    return PlaneTokens.Config(size=(size, size), kernel=16, stride=16, norm=LayerNorm.Config())


STANDS = tuple(Start(into=n, from_="clip", take=n, preset="tiny_vit") for n in ("vision", "text", "image_head", "text_head", "log_scale"))


def tiny() -> Preset:
    """Sound of one second on `clip` tiny_vit, frozen: 4x128, a spectrogram of 64x100."""
    mel = MelSpectrogram.Config(bins=64, frames=100)
    towers = clip(64, 8, clip_body(192, 6, 3), clip_body(192, 3, 3), 192, LayerNorm.Config(), vocab=4096, length=48, end=2)
    return Preset(
        data="scenes:sounds", starts=STANDS,
        config=ImageBind.Config(**towers, clip_samples=16_000, audio=bound(128, 4, 2, 192, 20.0, mel=mel, kernel=8, stride=6)),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48), video=VideoPlan(frames=8),
                  audio=AudioPlan(train_seconds=1.0)),
        stages=(Stage(name="audio", objective=ImageBind.bind, embed=ImageBind.embed, trainable=("audio.*",), steps=400, batch_size=64,
                      optim=Optim(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95), warmup=40, clip=1.0)),))


def tiny_depth() -> Preset:
    """Depth instead of sound: 4x96."""
    base = tiny()
    return base.but(data="scenes", config=base.config.but(audio=None, depth=bound(96, 4, 2, 192, 5.0, tokens=plane(64)))).but(
        **{"stages.0.trainable": ("depth.*",), "stages.0.name": "depth", "feed.audio": None})


def paper() -> Preset:
    """imagebind_huge, the stage that binds sound (AudioSet, 64 epochs). The frozen towers are OpenCLIP's ViT-H/14 and its text tower, which
    `clip_scaling` teaches; a taught ImageBind comes from its published file (layout `official`)."""
    image, text = (clip_body(w, d, 16, act="gelu").but(norm=NORM, **{"block.norm": NORM}) for w, d in ((1280, 32), (1024, 24)))
    senses: dict[str, Any] = {"audio": bound(768, 12, 12, 1024, 20.0, drop_path=0.1), "depth": bound(384, 12, 8, 1024, 5.0, tokens=plane(224)),
              "thermal": bound(768, 12, 12, 1024, 10.0, tokens=plane(224)),
              "imu": bound(512, 6, 8, 1024, 5.0, drop_path=0.7, dropout=0.5, tokens=WindowTokens.Config(length=2000, norm=LayerNorm.Config()))}
    return Preset(
        data="audioset", starts=tuple(s.but(from_="clip_scaling", preset="vit_h_14") for s in STANDS),
        config=ImageBind.Config(**clip(224, 14, image, text, 1024, NORM), **senses),
        feed=Feed(image=ImagePlan(size=224), text=TextPlan(vocab=49408, length=77, pad="zero"), video=VideoPlan(frames=2),
                  audio=AudioPlan(train_seconds=2.0)),
        stages=(Stage(name="audio", objective=ImageBind.bind, embed=ImageBind.embed, trainable=("audio.*",),
                      steps=64 * 1_700_000 // 512, batch_size=512,
                      optim=Optim(lr=1.6e-3, weight_decay=0.2, betas=(0.9, 0.95), warmup=2 * 1_700_000 // 512, clip=1.0)),))
