"""CLIP: two towers learn one space from pictures and the texts found beside them.

    I = norm(image_head(vision(image))),  T = norm(text_head(text(ids))),  logits = exp(s) I T^t
    loss = (CE(rows) + CE(columns)) / 2, the pairs of the batch being the targets (Radford et al. 2021, figure 3)

The negatives are the whole global batch; exp(s) starts at 1/0.07, is learned, and never exceeds 100. The text tower is causal and its
feature stands at the end token. A classifier for any list of names is then made of texts: embed "a photo of a {}." for each, average over
templates, re-normalise (`tasks.zero_shot`, `Pipeline.label`); scored on crops it detects (`Pipeline.detect`).
"""
from dataclasses import dataclass

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.card import Card
from polysense.base.system import Feed, ImagePlan, Optim, Preset, Stage, Start, TextPlan, ViewPlan, final
from polysense.nn.transformer import Transformer
from polysense.towers.clip import body, resnet_pair, tiny_pair, vit_pair
from polysense.weights import clip_hf, clip_open_clip, clip_openai

card = Card(
    name="CLIP", paper="Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021",
    arxiv="2103.00020", year=2021,
    says="Puts pictures and texts into one space: search, zero-shot labels and detection from any list of words.",
    needs=("image", "text"), can=("encode_image", "encode_text", "encode_patches"), official="openai/CLIP",
)

PARAMETERS = 427_616_513                     # ViT-L/14 at 224, the released archive

weights = {"openai": clip_openai.LAYOUT, "hf": clip_hf.LAYOUT, "open_clip": clip_open_clip.LAYOUT}


@final
class CLIP(DualEncoder):
    @dataclass(frozen=True, kw_only=True)
    class Config(DualEncoder.Config):
        pass


def config(size: int, patch: int, image: Transformer.Config, text: Transformer.Config, dim: int, vocab: int = 49408, length: int = 77,
           end: int | None = None) -> CLIP.Config:
    """A CLIP of two transformers; `end=None` finds the end token as OpenAI does, by its being the largest id."""
    return CLIP.Config(**vit_pair(size, patch, image, text, dim, vocab, length, end))


def tiny() -> Preset:
    """The ResNet tower at 64 px: on few pictures it learns about twice as fast as a ViT of its cost."""
    return Preset(
        data="scenes", config=CLIP.Config(**tiny_pair()),
        feed=Feed(image=ImagePlan(size=64), text=TextPlan(vocab=4096, length=48),
                  train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5, jitter=0.5, jitter_by=(0.3, 0.3, 0.3, 0.0))),
        stages=(Stage(objective=CLIP.compare, embed=CLIP.embed, steps=400, batch_size=128,
                      optim=Optim(lr=1.5e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, warmup=40, clip=1.0)),))


def tiny_vit() -> Preset:
    """The same with a ViT 6x192 of patch 8."""
    base = tiny()
    return base.but(config=config(64, 8, body(192, 6, 3), body(192, 3, 3), dim=192, vocab=4096, length=48, end=2)).but(
        **{"stages.0.optim.lr": 5e-4})


def tiny_photos() -> Preset:
    """The same on photographs: scenes with human captions, products with their titles."""
    return tiny().but(data="natural_captions+fashion_products")


def _paper(of: CLIP.Config, size: int, lr: float, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-6) -> Preset:
    return Preset(
        data="wit400m", config=of,
        feed=Feed(image=ImagePlan(size=size), train_image=ViewPlan(size=size, scale=(0.9, 1.0), ratio=(1.0, 1.0)),
                  text=TextPlan(vocab=49408, length=77, pad="zero")),
        stages=(Stage(objective=CLIP.compare, embed=CLIP.embed, steps=32 * 400_000_000 // 32_768, batch_size=32_768, checkpoint_activations=True,
                      optim=Optim(lr=lr, weight_decay=0.2, betas=betas, eps=eps, warmup=2000)),))


def paper() -> Preset:
    """ViT-L/14 at 224 px (section 2.5 and table 20)."""
    return _paper(config(224, 14, body(1024, 24, 16), body(768, 12, 12), dim=768), 224, 4e-4)


def paper_336() -> Preset:
    """ViT-L/14@336px: one more epoch at the higher resolution, on interpolated positions."""
    base = _paper(config(336, 14, body(1024, 24, 16), body(768, 12, 12), dim=768), 336, 2e-5)
    return base.but(starts=(Start(into="", from_="clip", preset="paper"),)).but(**{"stages.0.steps": 400_000_000 // 32_768})


def vit_b_32() -> Preset:
    return _paper(config(224, 32, body(768, 12, 12), body(512, 12, 8), dim=512), 224, 5e-4)


def vit_b_16() -> Preset:
    return _paper(config(224, 16, body(768, 12, 12), body(512, 12, 8), dim=512), 224, 5e-4)


def rn50() -> Preset:
    """The ResNet tower: its attention pool is the head."""
    return _paper(CLIP.Config(**resnet_pair(224, (3, 4, 6, 3), 64, 32, 1024, body(512, 12, 8))), 224, 5e-4, (0.9, 0.999), 1e-8)


def rn50x64() -> Preset:
    """The largest ResNet tower, 448 px (tables 19 and 20)."""
    return _paper(CLIP.Config(**resnet_pair(448, (3, 15, 36, 10), 128, 64, 1024, body(1024, 12, 16))), 448, 3.6e-4, (0.9, 0.999), 1e-8)
