"""Shapes of towers that several systems share: values, no weights."""
from typing import Any

from polysense.nn.block import PostNorm, PreNorm
from polysense.nn.head import Linear, NormLinear, Nothing
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.towers.bert import Bert
from polysense.towers.clip import body
from polysense.towers.clip_text import ClipText
from polysense.towers.swin import Swin
from polysense.towers.vit import ViT

EPS = LayerNorm.Config(eps=1e-6)


def vit_body(width: int, depth: int, heads: int) -> Transformer.Config:
    """timm's ViT: exact GELU, epsilon 1e-6, no norm before the blocks."""
    return Transformer.Config(width=width, depth=depth, heads=heads, norm=EPS, block=PreNorm.Config(norm=EPS))


def plain_vit(size: int, patch: int, width: int, depth: int, heads: int, **more: Any) -> ViT.Config:
    """timm's ViT as a tower; `more` are fields of ViT.Config."""
    return ViT.Config(image_size=size, patch=patch, body=vit_body(width, depth, heads), **more)


def tuned_vit(base: ViT.Config, classes: int, drop_path: float) -> tuple[ViT.Config, NormLinear.Config]:
    """A ViT as masked models are fine-tuned: the mean of the patches, the final norm behind it, a dense layer that begins small (He et al. 2022,
    MAE, appendix A.1; Fang et al. 2023, EVA)."""
    return (base.but(pool="mean", **{"body.norm": None, "body.drop_path": drop_path}),
            NormLinear.Config(into=base.width, out=classes, std=2e-5))


def bert(vocab: int, length: int, width: int, depth: int, heads: int) -> Bert.Config:
    """BERT: post-norm blocks, epsilon 1e-12, two segments."""
    norm = LayerNorm.Config(eps=1e-12)
    return Bert.Config(vocab=vocab, length=length, norm_pre=norm, body=Transformer.Config(
        width=width, depth=depth, heads=heads, norm=None, block=PostNorm.Config(norm=norm)))


def pre_norm_bert(vocab: int, length: int, width: int, depth: int, heads: int) -> Bert.Config:
    """A text tower that looks both ways, built like the ViT: norms before the branches and one at the end, no segments; read at its first token."""
    return Bert.Config(vocab=vocab, length=length, norm_pre=Nothing.Config(), kinds=0, body=vit_body(width, depth, heads))


def heads(image: int, text: int, dim: int) -> dict[str, Any]:
    """`image_head text_head` of a DualEncoder: projections without bias into `dim`."""
    return {"image_head": Linear.Config(into=image, out=dim), "text_head": Linear.Config(into=text, out=dim)}


def swin_pair(image: Swin.Config, text: tuple[int, int, int], dim: int, vocab: int = 49_408, length: int = 77,
              end: int | None = None) -> dict[str, Any]:
    """`vision text image_head text_head` of UniCL's family: Swin beside CLIP's text transformer (width, depth, heads) with epsilon 1e-12."""
    return {"vision": image, "text": ClipText.Config(vocab=vocab, length=length, end=end, body=body(*text).but(
        **{"norm.eps": 1e-12, "block.norm.eps": 1e-12})), **heads(image.width, text[0], dim)}


TINY_SWIN = Swin.Config(patch=4, base=32, depths=(1, 1, 2), heads=(1, 2, 4), window=4)
