"""From what is seen to what is hidden, among features: CAE's regressor and decoder. Shapes: B batch, N patches, K visible, M hidden, D width."""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.attention import Attention
from polysense.nn.build import build
from polysense.nn.drop import drop_path
from polysense.nn.init import NormalInit
from polysense.nn.masking import Masking, take
from polysense.nn.mlp import MLP
from polysense.nn.norm import LayerNorm
from polysense.nn.position import sincos_2d
from polysense.nn.transformer import Transformer


class RegressorBlock(Part):
    """Hidden places ask, the visible patches and they themselves are looked at: one cross-attention and an MLP (Chen et al. 2022, section 3.1).

    Positions are added to queries and keys, never to values. The norm before the MLP stands on the trunk itself, as in the released code:
    y = norm(x + a), then y + mlp(y).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner, as heads and drop_path
        heads: int = 0
        attn: Spec = field(default_factory=lambda: Attention.Config(bias="q v out"))
        mlp: Spec = field(default_factory=MLP.Config)
        norm: Spec = field(default_factory=lambda: LayerNorm.Config(eps=1e-6))
        layer_scale: float = 0.1
        drop_path: float = 0.0

    def __init__(self, c: Config):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v, self.norm = (build(c.norm, width=c.width) for _ in range(4))
        self.attn, self.mlp = build(c.attn, width=c.width, heads=c.heads), build(c.mlp, width=c.width)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((c.width,), c.layer_scale)) for _ in range(2))
        self.drop_path = c.drop_path

    def forward(self, query: Tensor, seen: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """query [B,M,D] of the hidden places `here` [B,M,D], seen [B,K,D] of the visible ones `there` [B,K,D] (positions) -> [B,M,D]."""
        all_of, places = torch.cat([seen, query], 1), torch.cat([there, here], 1)
        x = self.attn(self.norm_q(query + here), self.norm_k(all_of + places), value=self.norm_v(all_of))
        x = self.norm(query + drop_path(x * self.scale1, self.drop_path, self.training))
        return x + drop_path(self.mlp(x) * self.scale2, self.drop_path, self.training)


class LatentRegressor(Part):
    """The latent contextual regressor, then a decoder that does the pretext task from what it said alone (Chen et al. 2022, CAE, section 3.1).

    `blocks` of cross-attention turn one shared `token` into a feature for every hidden patch, in the space of the encoder; the visible features
    stay as they are. `body`, self-attention among the hidden patches and no others, and `head` say what stood there. The encoder's class token is
    not read. Positions are a fixed table, a buffer; its first half tells the row, as in the released code.
    """

    position: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        body: Transformer.Config             # of the decoder, its last norm included
        block: RegressorBlock.Config = field(default_factory=RegressorBlock.Config)
        depth: int = 4                       # of the regressor
        drop_path: float = 0.0               # of its last block; grows linearly from 0
        init: Spec = field(default_factory=NormalInit.Config)
        into: int = 0                        # width of the encoder's tokens; 0: set by the owner, as the next two
        out: int = 0                         # numbers to say of a patch, such as codes
        grid: tuple[int, int] | None = None  # of patches
        prefix: int = 1                      # tokens before the patches
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        width = c.body.width
        if c.grid is None or c.into != width:
            raise UserError(f"a regressor of width {width} on tokens of {c.into} over a grid {c.grid}",
                            "its features are those of the encoder: equal widths")
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks: Any = nn.ModuleList(build(c.block, width=width, heads=c.body.heads, drop_path=r) for r in rates)
        c.init.build()(self)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=c.std, a=-c.std, b=c.std))
        self.norm = build(c.block.norm, width=width)
        self.register_buffer("position", sincos_2d(width, c.grid).roll(width // 2, -1))
        self.body, self.head, self.prefix = c.body.build(), nn.Linear(width, c.out), c.prefix
        nn.init.trunc_normal_(self.head.weight, std=c.std, a=-2 * c.std, b=2 * c.std)
        nn.init.zeros_(self.head.bias)

    def regress(self, seen: Tensor, masking: Masking) -> Tensor:
        """seen [B, prefix + K, D], the encoder's tokens -> features of the hidden patches [B,M,D], normed, in the order of the grid."""
        place = self.position.expand(len(seen), -1, -1)
        here, there, seen = take(place, in_order(masking)), take(place, masking.keep), seen[:, self.prefix:]
        x = self.token.expand(len(seen), here.shape[1], -1).to(seen.dtype)
        for block in self.blocks:
            x = block(x, seen, here, there)
        return self.norm(x)

    def say(self, latents: Tensor, masking: Masking) -> Tensor:
        """Features of the hidden patches [B,M,D] -> what they are [B*M,out]; nothing else is read."""
        place = take(self.position.expand(len(latents), -1, -1), in_order(masking))
        return self.head(self.body(latents + place)).flatten(0, 1)

    def forward(self, seen: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """seen [B, prefix + K, D] -> what hidden patches are [B*M,out], samples one after the other in the order of the grid, and their features
        [B,M,D] in the same order."""
        latents = self.regress(seen, masking)
        return self.say(latents, masking), latents


def in_order(masking: Masking) -> Tensor:
    """[B,M], the numbers of the hidden patches in the order of the grid, whatever that of the mask."""
    return masking.hidden.sort(1).values
