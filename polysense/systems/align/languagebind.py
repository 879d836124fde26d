"""LanguageBind: sound, video, depth and heat meet language directly, each in its own tower, all beside one text tower that never moves.

Every modality becomes something like a picture of three channels, and its tower is CLIP's image tower with few new weights:

    k_M = norm(head_M(tower_M(m))),   t = norm(text_head(text(words))),   loss_M = (CE(s_M k_M t^t) + CE(s_M t k_M^t)) / 2

The text tower is frozen, the temperature s_M learned, and no modality shares a weight with another: in which order they are bound makes no
difference, and since all lie near the same texts, they can be compared with each other and with pictures, whose tower stays plain CLIP.

Towers: low-rank updates on the attention's linears (for video, on what looks along time), and only a part of the patches in training, for a
video the same places in every frame. Depth is cut at so many metres and heat taken as it is, both repeated three times; of a sound the spectrogram's
front, middle and back are the channels; a video is frames whose blocks look along time before they look around, and are averaged. A clip may come
with several texts of different origin, of which training draws one (`data.text_views`). Where there is no video tower, frames are read as pictures.
"""
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.senses import Sense, SenseSpace, plane, sense
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.plan import AudioPlan, VideoPlan
from polysense.base.system import After, Batch, Feed, ImagePlan, Losses, Optim, Preset, Spec, Stage, Start, TextPlan, final
from polysense.nn.frames import over_time
from polysense.nn.head import Linear
from polysense.nn.mel import MelChunks
from polysense.nn.planes import ThreeChannels
from polysense.nn.transformer import Transformer
from polysense.objectives.contrastive import info_nce
from polysense.towers.clip import body, image_tower
from polysense.towers.clip_text import ClipText
from polysense.weights import languagebind_hf

card = Card(
    name="LanguageBind", arxiv="2310.01852", year=2024, paper="Zhu et al., LanguageBind: Extending Video-Language Pretraining to N-modality by "
    "Language-based Semantic Alignment, ICLR 2024",
    says="Puts sound, video, depth and heat into the space of texts, learning each from its own captions beside a frozen text tower.",
    needs=("text", "audio|video|depth|thermal"), official="PKU-YuanGroup/LanguageBind",
    can=("encode_image", "encode_text", "encode_patches", "encode_video", "encode_audio", "encode_depth", "encode_thermal"),
)

PARAMETERS = 731_975_938                     # paper(): CLIP ViT-L/14 427.6M, the tower of depth 303.2M, its head and updates; no total is published

weights = {"hf": languagebind_hf.LAYOUT}
LEARNED = ("video", "audio", "depth", "thermal")
SENSES = ("image", *LEARNED)


@final
class LanguageBind(SenseSpace):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        text: ClipText.Config
        text_head: Spec
        image: Sense.Config | None = None
        video: Sense.Config | None = None
        audio: Sense.Config | None = None
        depth: Sense.Config | None = None
        thermal: Sense.Config | None = None

    SENSES = SENSES

    def __init__(self, c: Config):
        super().__init__()
        self.text, self.text_head = c.text.build(), c.text_head.build()
        self.image, self.video, self.audio, self.depth, self.thermal = (
            s.build() if s else None for s in (c.image, c.video, c.audio, c.depth, c.thermal))

    @property
    def scale(self) -> Tensor:
        """The temperature of pictures, or of the first modality that is there."""
        return next(s for s in (getattr(self, n) for n in SENSES) if s is not None).scale

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """`text` and every modality of the batch, unit norm [B,D]; of each only the patches that its sampler leaves."""
        found = [s for s in LEARNED if s in batch]
        if not found:
            raise UserError("the batch holds nothing to bind to its texts", f"give one of {', '.join(LEARNED)}")
        with torch.no_grad():
            text = self.encode_text(batch["text"])
        return {"text": text, **{s: self.sense(s).part(self.checked(s, batch[s])) for s in found}}

    def bind(self, seen: dict[str, Tensor]) -> Losses:
        """One symmetric InfoNCE between each modality and its texts, at its own temperature."""
        return Losses(**{s: info_nce(seen[s], seen["text"], self.sense(s).scale) for s in LEARNED if s in seen})

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], unit norm."""
        return self.sense("image")(self.checked("image", image))

    def encode_patches(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,D], unit norm."""
        own = self.sense("image")
        return F.normalize(own.head(own.tower.dense(image)).float(), dim=-1)

    def encode_video(self, video: Tensor) -> Tensor:
        """video [B,T,3,H,W] -> [B,D], unit norm. Without a tower for it, the normalised mean of what the image tower says of its frames."""
        return self.sense("image" if self.video is None else "video")(self.checked("video", video))

    def encode_audio(self, audio: Tensor) -> Tensor:
        """audio [B,S] at 16 kHz -> [B,D], unit norm."""
        return self.sense("audio")(self.checked("audio", audio))

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        for name in LEARNED:
            if (own := getattr(self, name)) is not None:
                own.log_scale.clamp_(max=log(100.0))


def clip(size: int, patch: int, image: Transformer.Config, text: Transformer.Config, dim: int, vocab: int = 49_408, length: int = 77,
         end: int | None = None) -> dict[str, Any]:
    """The towers of CLIP that stay as they are."""
    return {"image": sense(image_tower(size, patch, image), dim), "text": ClipText.Config(vocab=vocab, length=length, body=text, end=end),
            "text_head": Linear.Config(into=text.width, out=dim)}


def stands(*senses: str, preset: str = "tiny_vit") -> tuple[Start, ...]:
    """The text side of a CLIP, and its image side once for every tower."""
    sides = [("text", "text"), ("text_head", "text_head")]
    sides += [(f"{s}.{into}", take) for s in senses for into, take in (("tower", "vision"), ("head", "image_head"))]
    sides += [("image.log_scale", "log_scale")] * ("image" in senses)
    return tuple(Start(into=into, from_="clip", take=take, preset=preset) for into, take in sides)


def trains(name: str, steps: int, batch: int, lr: float, old: float, **more: Any) -> Stage:
    """The updates, what is new, and with the rate times `old` what surrounds CLIP's blocks; the blocks themselves stay."""
    new = {"video": ("*.position_time", "*.norm_time.*")}.get(name, ())
    around = tuple(f"{name}.{n}" for n in ("tower.patch.*", "tower.cls", "tower.position", "tower.norm_pre.*", "tower.body.norm.*", "head.*"))
    return Stage(name=name, objective=LanguageBind.bind, embed=LanguageBind.embed, steps=steps, batch_size=batch,
                 trainable=(f"{name}.*.lora.*", *new, *around, f"{name}.log_scale"),
                 optim=Optim(lr=lr, betas=(0.9, 0.98), eps=1e-6, clip=1.0, lr_scale=tuple((a, old) for a in around), **more))


SMALL, WORDS = body(192, 6, 3), TextPlan(vocab=4096, length=48)
HERE = clip(64, 8, SMALL, body(192, 3, 3), 192, vocab=4096, length=48, end=2)


def tiny() -> Preset:
    """Sounds of five seconds on `clip` tiny_vit. A spectrogram is far from photographs: what surrounds the blocks learns at half the rate."""
    mel = MelChunks.Config(bins=64, frames=128, hop=0.02, std=4.569)
    own = sense(plane(SMALL, (64, 128), 8, mel), 192, rank=8, ratio=0.3)
    return Preset(
        data="esc10", config=LanguageBind.Config(**HERE, audio=own), starts=stands("image", "audio"),
        feed=Feed(image=ImagePlan(size=64), text=WORDS, audio=AudioPlan(train_seconds=5.0)),
        stages=(trains("audio", 300, 32, 2e-3, 0.5, weight_decay=0.05, warmup=30),))


def tiny_depth() -> Preset:
    """Maps of distance instead: updates of rank 2, half of the patches."""
    own = sense(plane(SMALL, (64, 64), 8, ThreeChannels.Config()), 192, rank=2, ratio=0.5)
    return tiny().but(data="scenes", config=LanguageBind.Config(**HERE, depth=own), starts=stands("image", "depth"),
                      stages=(trains("depth", 300, 64, 2e-3, 0.1, weight_decay=0.05, warmup=30),), **{"feed.audio": None})


def tiny_video() -> Preset:
    """Clips of eight frames."""
    own = sense(image_tower(64, 8, over_time(SMALL, 8)), 192, rank=8, ratio=0.3, on="*.attn_time.q|k|v|out")
    return tiny().but(data="scenes:clips", config=LanguageBind.Config(**HERE, video=own), starts=stands("image", "video"), **{
        "feed.audio": None, "feed.video": VideoPlan(frames=8)}, stages=(trains("video", 200, 16, 1e-3, 0.1, weight_decay=0.05, warmup=20),))


LARGE = body(1024, 24, 16)
FULL = clip(224, 14, LARGE, body(768, 12, 12), 768)


def _paper(name: str, own: Sense.Config, data: str, stage: Stage, **feed: Any) -> Preset:
    return Preset(data=data, config=LanguageBind.Config(**FULL).but(**{name: own}), starts=stands("image", name, preset="paper"), stages=(stage,),
                  feed=Feed(image=ImagePlan(size=224), text=TextPlan(vocab=49_408, length=77, pad="zero"), **feed))


def paper() -> Preset:
    """Depth: three million maps in metres, one epoch of batch 1024 (appendix B), on `clip` paper. Released files stand on OpenCLIP's ViT-L/14 of the
    same shape and are read with its activation."""
    own = sense(plane(LARGE, (224, 224), 14, ThreeChannels.Config(far=10.0)), 768, rank=2, ratio=0.5)
    return _paper("depth", own, "vidal_depth", trains("depth", 3_000_000 // 1024, 1024, 5e-4, 1e-3, weight_decay=0.2, warmup=200))


def paper_thermal() -> Preset:
    """Heat: the same, in [0, 1]."""
    own = sense(plane(LARGE, (224, 224), 14, ThreeChannels.Config()), 768, rank=2, ratio=0.5)
    return _paper("thermal", own, "vidal_thermal", trains("thermal", 3_000_000 // 1024, 1024, 5e-4, 1e-3, weight_decay=0.2, warmup=200))


def paper_audio() -> Preset:
    """Sounds of ten seconds: 126 bins of 1036 frames (the release has 112), updates of rank 16, a tenth of the patches hidden."""
    own = sense(plane(LARGE, (126, 1036), 14, MelChunks.Config(bins=126, frames=1036, std=4.569)), 768, rank=16, ratio=0.1)
    return _paper("audio", own, "vidal_audio", trains("audio", 1_000_000 // 512, 512, 5e-4, 1e-3, weight_decay=0.2, warmup=200),
                  audio=AudioPlan(train_seconds=None))


def paper_video() -> Preset:
    """Clips of eight frames: updates on what looks along time, of rank 16, three tenths of the patches hidden, 16 epochs."""
    own = sense(image_tower(224, 14, over_time(LARGE, 8)), 768, rank=16, ratio=0.3, on="*.attn_time.q|k|v|out")
    return _paper("video", own, "vidal_video", trains("video", 16 * 3_000_000 // 640, 640, 1e-4, 1e-3, weight_decay=0.2, warmup=2000),
                  video=VideoPlan(frames=8))
