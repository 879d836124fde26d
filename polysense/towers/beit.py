"""BEiT's tower: a ViT without absolute positions whose layers add a relative position bias."""
from dataclasses import dataclass

from torch import Tensor

from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.init import RescaledInit
from polysense.nn.norm import LayerNorm
from polysense.nn.relative import BiasedTransformer, RelativeBias
from polysense.towers.vit import ViT

SHARED = "body.relative.table"


class BeitTower(ViT):
    """The body is a BiasedTransformer (pre-training: one table) or a Transformer of BiasedAttention (fine-tuning: one a layer)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ViT.Config):
        position: str = "none"

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a Start's weights become here: a shared table is copied to every layer that has its own, a final norm that is not here is left
        behind (fine-tuning puts its own behind the pooling)."""
        mine, out = self.state_dict(), dict(weights)
        own = [name for name in mine if name.startswith("body.blocks.") and name.endswith("attn.relative.table")]
        if SHARED in out and own:
            table = out.pop(SHARED)
            out |= {name: table.clone() for name in own}
        return {k: v for k, v in out.items() if not (k.startswith("body.norm.") and k not in mine)}


def shared_bias(size: int, patch: int, width: int, depth: int, heads: int, scale: float, drop_path: float = 0.0,
                eps: float = 1e-6) -> BeitTower.Config:
    """BEiT's tower in pre-training, and that of those who follow it: one table of relative positions for all layers, scaled branches, a final norm,
    the mean of the patches pooled."""
    norm = LayerNorm.Config(eps=eps)
    return BeitTower.Config(image_size=size, patch=patch, pool="mean", body=BiasedTransformer.Config(
        width=width, depth=depth, heads=heads, norm=norm, drop_path=drop_path, init=RescaledInit.Config(),
        relative=RelativeBias.Config(grid=(size // patch, size // patch)),
        block=PreNorm.Config(attn=Attention.Config(bias="q v out"), norm=norm, layer_scale=scale)))
