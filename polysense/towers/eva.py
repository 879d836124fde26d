"""EVA's tower: a ViT whose patches also turn by their place, and the shapes of its two generations."""
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.rotary import GridRotary
from polysense.nn.subnorm import BranchNorm, SubNormAttention, SubNormGatedMLP
from polysense.nn.transformer import Transformer
from polysense.towers.vit import ViT

NORM = LayerNorm.Config(eps=1e-6)
BIASED = "q v out"                           # keys have none


class EvaViT(ViT):
    """Learned absolute positions, and rotations of queries and keys by row and column where the attentions have them (Fang et al. 2023, EVA-02).

    The class token stands at (0, 0) and does not turn. Where only some patches are read, the rotations are those of the kept places.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ViT.Config):
        pass

    def place(self, x: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Any:
        """The angles of all tokens, computed once for all blocks; None for a tower without rotations."""
        rope = self.body.blocks[0].attn.rope
        return None if rope is None else rope.turn(rope.places(grid, self.prefix, keep, x.device))


def eva02(size: int, patch: int, width: int, depth: int, heads: int, hidden: int | None = None, grid: int = 16, **more: Any) -> EvaViT.Config:
    """SwiGLU of 8/3 of the width and rotations, each branch with its inner norm. more: fields of ViT."""
    block = PreNorm.Config(norm=NORM, attn=SubNormAttention.Config(bias=BIASED, rope=GridRotary.Config(grid=grid), norm_inner=NORM),
                           mlp=SubNormGatedMLP.Config(hidden=hidden or int(width * 8 / 3), bias="gate up down", norm_inner=NORM))
    return _tower(size, patch, Transformer.Config(width=width, depth=depth, heads=heads, norm=NORM, block=block), more)


def eva01(size: int, patch: int, width: int, depth: int, heads: int, hidden: int, **more: Any) -> EvaViT.Config:
    """A plain ViT whose keys have no bias."""
    block = PreNorm.Config(norm=NORM, attn=Attention.Config(bias=BIASED), mlp=MLP.Config(hidden=hidden))
    return _tower(size, patch, Transformer.Config(width=width, depth=depth, heads=heads, norm=NORM, block=block), more)


def eva02_e(size: int, patch: int, width: int, depth: int, heads: int, hidden: int, **more: Any) -> EvaViT.Config:
    """The same with the norms behind the branches."""
    block = BranchNorm.Config(norm=NORM, attn=Attention.Config(bias=BIASED), mlp=MLP.Config(hidden=hidden))
    return _tower(size, patch, Transformer.Config(width=width, depth=depth, heads=heads, norm=NORM, block=block), more)


def _tower(size: int, patch: int, body: Transformer.Config, more: dict[str, Any]) -> EvaViT.Config:
    return EvaViT.Config(image_size=size, patch=patch, body=body, dense="values", **more)
