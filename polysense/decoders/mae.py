"""The decoder of masked autoencoders. Shapes: B batch, N patches, K visible, M hidden, D width."""
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.masking import Masking, take
from polysense.nn.position import SeparablePositions, sincos_2d, sincos_pairs
from polysense.nn.transformer import Transformer


class MAEDecoder(Part):
    """A few narrow blocks that fill in what the encoder did not see (He et al. 2022, section 3; Tong et al. 2022).

    Visible tokens through a linear, one shared `token` for every hidden patch, a fixed table of positions (a buffer) for all, blocks, norm, linear.
    The sequence is [prefix, visible, hidden]: attention does not mind the order, so nothing is unshuffled, and norm, last block and head
    compute the hidden tokens alone, as nobody asks for the others.
    """

    position: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        body: Transformer.Config
        into: int = 0                        # width of the encoder's tokens; 0: set by the owner, as the next two
        out: int = 0                         # numbers to predict for a patch
        grid: tuple[int, ...] | None = None  # of patches: (h, w): two-dimensional sines and cosines; (t, h, w): one line of them over all cubes
        prefix: int = 1                      # tokens before the patches (the class token): read, not predicted
        bias: str = "embed head"             # the linears that have one

    def __init__(self, c: Config):
        super().__init__()
        if c.grid is None:
            raise UserError("the decoder's grid is not set", "say (h, w) or (t, h, w)")
        width, self.prefix = c.body.width, c.prefix
        self.embed = nn.Linear(c.into, width, bias="embed" in c.bias.split())
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_buffer("position", sincos_2d(width, c.grid, c.prefix) if len(c.grid) == 2 else  # type: ignore[arg-type]
                             torch.cat([torch.zeros(c.prefix, width), sincos_pairs(width, prod(c.grid))])[None])
        self.body = c.body.build()
        self.head = nn.Linear(width, c.out, bias="head" in c.bias.split())
        for linear in (self.embed, self.head):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def tokens(self, seen: Tensor, masking: Masking) -> Tensor:
        """seen [B, prefix + K, into] -> [B, prefix + N, D] before the blocks, in the order prefix, visible, hidden."""
        patches = self.position.shape[1] - self.prefix
        if masking.mask.shape[1] != patches:
            raise UserError(f"a mask over {masking.mask.shape[1]} patches", f"this decoder fills in a grid of {patches}")
        place = self.position[:, self.prefix:].expand(len(seen), -1, -1)
        x = self.embed(seen)
        visible = x[:, self.prefix:] + take(place, masking.keep)
        hidden = self.token + take(place, masking.hidden)
        return torch.cat([x[:, :self.prefix] + self.position[:, :self.prefix], visible, hidden.to(x.dtype)], 1)

    def forward(self, seen: Tensor, masking: Masking) -> Tensor:
        """seen [B, prefix + K, into], the encoder's tokens -> predictions for the hidden patches [B,M,out] in the order of `masking.hidden`."""
        x = self.body.layers(self.tokens(seen, masking), stop=-1)[-1]
        hidden = x[:, self.prefix + masking.visible:]
        return self.head(self.body.norm(self.body.blocks[-1](x, query=hidden)))

    def whole(self, seen: Tensor, masking: Masking) -> Tensor:
        """The same for every patch, [B,N,out] in the order of the grid; no objective trains the visible ones."""
        said = self.head(self.body(self.tokens(seen, masking)))[:, self.prefix:]
        return take(said, masking.restore)


class SeparableDecoder(MAEDecoder):
    """The same for clips with learned positions of space and of time, and a class token of its own: the encoder's is not read (Feichtenhofer et al.
    2022, MAE-ST, section 3 and released code)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MAEDecoder.Config):
        pass

    def __init__(self, c: Config):
        if c.grid is None or len(c.grid) != 3:
            raise UserError(f"a decoder of clips over a grid {c.grid}", "say (t, h, w)")
        super().__init__(c)
        del self.position
        self.cls = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, c.prefix, c.body.width), std=0.02, a=-0.04, b=0.04))
        self.place = SeparablePositions.Config(width=c.body.width, grid=c.grid, prefix=c.prefix).build()

    def tokens(self, seen: Tensor, masking: Masking) -> Tensor:
        place = self.place()
        if masking.mask.shape[1] != place.shape[1]:
            raise UserError(f"a mask over {masking.mask.shape[1]} cubes", f"this decoder fills in a grid of {place.shape[1]}")
        place, x = place.expand(len(seen), -1, -1), self.embed(seen[:, self.prefix:])
        first = (self.cls + self.place.first).expand(len(seen), -1, -1)
        return torch.cat([first.to(x.dtype), x + take(place, masking.keep), (self.token + take(place, masking.hidden)).to(x.dtype)], 1)
