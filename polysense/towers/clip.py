"""The shapes of CLIP's towers and heads, for every system that is built like CLIP or stands on its weights."""
from typing import Any

from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.head import Linear, Nothing
from polysense.nn.init import ClipInit
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.towers.clip_resnet import ClipResNet
from polysense.towers.clip_text import ClipText
from polysense.towers.vit import ViT


def body(width: int, depth: int, heads: int, act: str = "quick_gelu") -> Transformer.Config:
    """CLIP's transformer. OpenAI's weights use QuickGELU, LAION's exact GELU: it is said here, never guessed."""
    return Transformer.Config(width=width, depth=depth, heads=heads, init=ClipInit.Config(),
                              block=PreNorm.Config(attn=Attention.Config(), mlp=MLP.Config(act=act)))


def image_tower(size: int, patch: int, of: Transformer.Config) -> ViT.Config:
    return ViT.Config(image_size=size, patch=patch, body=of, patch_bias="", norm_pre=LayerNorm.Config(), dense="values", std=None)


def vit_pair(size: int, patch: int, image: Transformer.Config, text: Transformer.Config, dim: int, vocab: int = 49408, length: int = 77,
             end: int | None = None) -> dict[str, Any]:
    """`vision text image_head text_head` of a DualEncoder of two transformers; `end=None` finds the end token as OpenAI does, by its being
    the largest id."""
    return {"vision": image_tower(size, patch, image), "text": ClipText.Config(vocab=vocab, length=length, body=text, end=end),
            "image_head": Linear.Config(into=image.width, out=dim), "text_head": Linear.Config(into=text.width, out=dim)}


def resnet_pair(size: int, layers: tuple[int, ...], base: int, heads: int, dim: int, text: Transformer.Config, vocab: int = 49408,
                length: int = 77, end: int | None = None) -> dict[str, Any]:
    """The same with the ResNet tower: its attention pool is the head."""
    return {"vision": ClipResNet.Config(image_size=size, layers=layers, base=base, heads=heads, dim=dim),
            "text": ClipText.Config(vocab=vocab, length=length, body=text, end=end),
            "image_head": Nothing.Config(), "text_head": Linear.Config(into=text.width, out=dim)}


def tiny_pair() -> dict[str, Any]:
    """The towers of `clip` tiny, which lends its weights: the ResNet tower at 64 px, which on few pictures learns about twice as fast as a
    ViT of its cost."""
    return resnet_pair(64, (1, 1, 1), 32, 4, 192, body(192, 3, 3), vocab=4096, length=48, end=2)
