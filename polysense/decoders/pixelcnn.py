"""Gated PixelCNN: an autoregressive distribution over grids of codes. Shapes: B batch, h w grid, K codes, D width."""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.vq_codec import check_codes


def _gate(x: Tensor) -> Tensor:
    one, two = x.chunk(2, 1)
    return torch.tanh(one) * torch.sigmoid(two)


class _Gated(nn.Module):
    """One layer of the vertical stack (all rows up to this one) and of the horizontal stack (this row, up to here), which reads the vertical
    one from the row above: so nothing is missed and nothing later is seen (van den Oord et al. 2016, Conditional Image Generation, figure 2)."""

    def __init__(self, width: int, kernel: int, first: int):
        super().__init__()
        self.reach, self.first = kernel // 2, first
        self.v = nn.Conv2d(width, 2 * width, (self.reach + 1, kernel))
        self.h = nn.Conv2d(width, 2 * width, (1, self.reach + 1 - first))         # the first layer does not see the place itself
        self.link, self.out = nn.Conv2d(2 * width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        up = self.v(F.pad(v, (self.reach, self.reach, self.reach, 0)))
        left = self.h(F.pad(h, (self.reach, 0, 0, 0)))[..., :h.shape[-1]]
        mixed = self.out(_gate(left + self.link(F.pad(up, (0, 0, 1, -1)))))
        return _gate(up), mixed if self.first else h + mixed


class PixelCNN(Part):
    """p(ids) = prod p(id | all ids above, and to the left in the same row)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codes: int
        width: int
        depth: int
        side: int                            # of the grids that are sampled
        kernel: int = 3                      # of the first layer: kernel + 4

    def __init__(self, c: Config):
        super().__init__()
        self.codes, self.side = c.codes, c.side
        self.embed = nn.Embedding(c.codes, c.width)
        self.layers: Any = nn.ModuleList(_Gated(c.width, c.kernel if i else c.kernel + 4, int(i == 0)) for i in range(c.depth))
        self.hidden, self.head = nn.Conv2d(c.width, c.width, 1), nn.Conv2d(c.width, c.codes, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B,h,w] -> logits [B,h,w,K] of each place given those before it in raster order."""
        check_codes(ids, self.codes)
        v = h = self.embed(ids).permute(0, 3, 1, 2)
        for layer in self.layers:
            v, h = layer(v, h)
        return self.head(F.relu(self.hidden(F.relu(h)))).permute(0, 2, 3, 1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """count grids [count,side,side], drawn place by place: each costs a pass over the rows that are there."""
        ids = torch.zeros(count, self.side, self.side, dtype=torch.long, device=self.head.weight.device)
        for y in range(self.side):
            for x in range(self.side):
                chance = (self(ids[:, :y + 1])[:, y, x].float() / temperature).softmax(-1)
                ids[:, y, x] = torch.multinomial(chance, 1, generator=generator)[:, 0]
        return ids
