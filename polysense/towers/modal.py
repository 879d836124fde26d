"""A transformer over the tokens of any modality. Shapes: B batch, N tokens, D width."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.nn.build import build
from polysense.nn.masking import take
from polysense.nn.position import fit_positions
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower


class ModalViT(Tower):
    """ViT's body (Dosovitskiy et al. 2021) behind an exchangeable front: z0 = [cls; tokens(front(x))] + position, blocks, norm; pooled = cls.

    Names agree with `ViT`, so that a picture's ViT lends its weights to a tower of clips (`ClipTokens.adapt`).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        tokens: Spec                         # of nn.tokens: PlaneTokens, ClipTokens or WindowTokens
        body: Transformer.Config
        front: Spec | None = None            # in front of the tokens, such as nn.mel.MelSpectrogram
        norm_pre: Spec | None = None         # before the blocks (CLIP)

        @property
        def width(self) -> int:
            return self.body.width

    def __init__(self, c: Config):
        super().__init__()
        self.width = c.width
        self.front = c.front.build() if c.front is not None else None
        self.patch = build(c.tokens, width=c.width)
        self.cls = nn.Parameter(torch.randn(1, 1, c.width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + c.tokens.count, c.width) * 0.02)  # type: ignore[attr-defined]
        self.norm_pre = build(c.norm_pre, width=c.width) if c.norm_pre is not None else None
        self.body = c.body.build()
        self.grid: tuple[int, int] | None = getattr(c.tokens, "grid", None)

    def adapt(self, name: str, value: Tensor) -> Tensor:
        """Positions of a picture's square grid, interpolated to the grid of this plane."""
        fits = name == "position" and value.ndim == 3 and self.grid is not None
        return fit_positions(value, 1, self.grid) if fits else value  # type: ignore[arg-type]

    def grid_of(self, given: Tensor) -> tuple[int, int]:
        """The grid of tokens (h, w) of whatever is read. UserError for a tower whose tokens are no plane."""
        if self.grid is None:
            raise UserError("the tokens of this tower do not lie on a plane", "nothing can be hidden place by place")
        return self.grid

    def forward(self, given: Tensor, short: bool = False, keep: Tensor | None = None) -> Encoded:
        """What front and tokens read -> tokens [B,1+N,D] (normed), pooled [B,D]. short: tokens are [B,1,D]. keep [B,K]: only these tokens are read,
        each with the position of its place (FLIP). UserError for wrong shapes."""
        x = self.patch(given if self.front is None else self.front(given)) + self.position[:, 1:]
        if keep is not None:
            x = take(x, keep)
        x = torch.cat([(self.cls + self.position[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = x if self.norm_pre is None else self.norm_pre(x)
        x = self.body(x, at=torch.zeros(len(x), dtype=torch.long, device=x.device) if short else None)
        return Encoded(tokens=x, pooled=x[:, 0])

    def pooled(self, given: Tensor, /) -> Tensor:
        """`self(given).pooled` [B,D], the same numbers for less."""
        return self(given, short=True).pooled
