"""Grids of codes written one after the other. Shapes: B batch, h w grid, N = side * side, F tokens in front, K codes, D width."""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.decoders.vq_codec import check_codes
from polysense.nn.transformer import Transformer


class CodeWriter(Part):
    """p(ids | front) = prod p(id | front, all ids before it in raster order), by a causal transformer (Esser et al. 2021, section 3.2).

    In front stand F tokens of `told` kinds: one start token that is always the same, a class, or the codes of another picture.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codes: int
        side: int                            # of a grid, and of the window that slides over larger ones
        body: Transformer.Config
        front: int = 1                       # tokens in front
        told: int = 1                        # how many different ones there are
        std: float = 0.02

    def __init__(self, c: Config):
        super().__init__()
        width = c.body.width
        self.codes, self.side, self.front, self.kinds = c.codes, c.side, c.front, c.told
        self.embed, self.told = nn.Embedding(c.codes, width), nn.Embedding(c.told, width)
        self.position = nn.Parameter(torch.zeros(1, c.front + c.side ** 2 - 1, width))
        self.body, self.head = c.body.build(), nn.Linear(width, c.codes, bias=False)
        for weight in (self.embed.weight, self.told.weight, self.head.weight, self.position):
            nn.init.normal_(weight, std=c.std)

    def begin(self, front: Tensor | None, count: int) -> Tensor:
        """front [B,F] ids, or None for the one start token -> [B,F,D]. Raises UserError for others than these."""
        if front is None:
            if self.front != 1 or self.kinds != 1:
                raise UserError("nothing stands in front of the codes", f"this prior reads {self.front} numbers below {self.kinds} first")
            front = torch.zeros(count, 1, dtype=torch.long, device=self.position.device)
        if front.shape != (count, self.front):
            raise UserError(f"{list(front.shape)} numbers in front of {count} grids of codes", f"this prior reads {self.front} for each")
        check_codes(front, self.kinds)
        return self.told(front)

    def stream(self, ids: Tensor, front: Tensor | None) -> Tensor:
        """ids [B,h,w], front [B,F] or None -> what the body reads, [B,F+N-1,D]."""
        if ids.shape[1:] != (self.side, self.side):
            raise UserError(f"grids of {list(ids.shape[1:])} codes", f"this prior reads {self.side}x{self.side}")
        check_codes(ids, self.codes)
        return torch.cat([self.begin(front, len(ids)), self.embed(ids.flatten(1)[:, :-1])], 1) + self.position

    def forward(self, ids: Tensor, front: Tensor | None = None) -> Tensor:
        """ids [B,side,side], front [B,F] or None -> logits [B,side,side,K] of each place given what comes before it."""
        hidden = self.body(self.stream(ids, front), causal=True)[:, self.front - 1:]
        return self.head(hidden).unflatten(1, (self.side, self.side))

    def features(self, ids: Tensor, depth: int, front: Tensor | None = None) -> Tensor:
        """ids [B,side,side] -> [B,D], mean over all tokens behind the first `depth` blocks (Yu et al. 2022, section 3.3)."""
        return self.body.layers(self.stream(ids, front), causal=True, stop=depth)[-1].mean(1)

    @torch.no_grad()
    def sample(self, count: int, front: Tensor | None = None, *, grid: tuple[int, int] | None = None, temperature: float = 1.0,
               top_k: int = 0) -> Tensor:
        """count grids [count,h,w], drawn from the `top_k` likeliest codes of each place (0: from all), with torch's global random numbers.

        A grid larger than side x side is written through a window of that size, in the middle of which, as far as the borders let it, the next code
        stands; front is then [B,F], the same for all windows, or a grid [B,h,w] that is cut alike. Raises UserError for a smaller grid.
        """
        h, w = grid or (self.side, self.side)
        if min(h, w) < self.side:
            raise UserError(f"a grid of {h}x{w} codes", f"this prior writes {self.side}x{self.side} and larger ones")
        if (h, w) != (self.side, self.side):
            return self._wide(count, front, h, w, temperature, top_k)
        x = self.begin(None if front is None else front.flatten(1), count) + self.position[:, :self.front]
        cache, ids = self.body.cache(count, self.front + h * w - 1), list[Tensor]()
        for i in range(h * w):
            ids.append(drawn(self.head(self.body(x, causal=True, cache=cache)[:, -1]), temperature, top_k))
            if i < h * w - 1:
                x = self.embed(ids[-1]) + self.position[:, self.front + i, None]
        return torch.cat(ids, 1).unflatten(1, (h, w))

    def _wide(self, count: int, front: Any, h: int, w: int, temperature: float, top_k: int) -> Tensor:
        ids, n = torch.zeros(count, h, w, dtype=torch.long, device=self.position.device), self.side
        for y in range(h):
            for x in range(w):
                top, left = min(max(y - n // 2, 0), h - n), min(max(x - n // 2, 0), w - n)
                cut = (slice(None), slice(top, top + n), slice(left, left + n))
                seen = front[cut].flatten(1) if front is not None and front.ndim == 3 else front
                ids[:, y, x] = drawn(self(ids[cut], seen)[:, y - top, x - left], temperature, top_k)[:, 0]
        return ids


def drawn(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """logits [B,K] -> one of the `top_k` likeliest (0: of all), [B,1]."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)
