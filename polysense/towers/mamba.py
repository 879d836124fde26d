"""Mamba. Shapes: B batch, L tokens, D width, E inner width, N states a channel, R rank of the step, K kernel, V vocabulary."""
from dataclasses import dataclass, field
from math import ceil, log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.check import check_text
from polysense.nn.norm import RMSNorm
from polysense.nn.scan import scan
from polysense.towers.causal_lm import last_real
from polysense.towers.decoding import Greedy
from polysense.towers.encoded import Encoded, Tower

State = tuple[Tensor, Tensor]                # what one block remembers: the last K-1 inputs of its convolution [B,E,K-1], and h [B,E,N]
Three = tuple[Tensor, Tensor, Tensor]        # step [B,L,E], written [B,L,N], read [B,L,N]
STEPS = (1e-3, 0.1)                          # between which the steps lie at birth, evenly in their logarithm


def step_bias(width: int) -> Tensor:
    """[E] whose softplus is log-uniform in STEPS."""
    low, high = (log(s) for s in STEPS)
    step = (torch.rand(width) * (high - low) + low).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


class Selective(Part):
    """Step, what is written and what is read depend on the token (Gu & Dao 2023, section 3.2): low W_low x, step = softplus(W low + bias)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the block, as states
        states: int = 0
        rank: int = 0                        # 0: ceil(E / 32), which is ceil(D / 16) where E = 2 D

    def __init__(self, c: Config):
        super().__init__()
        rank = c.rank or ceil(c.width / 32)
        self.low, self.step = nn.Linear(c.width, rank + 2 * c.states, bias=False), nn.Linear(rank, c.width)
        nn.init.uniform_(self.step.weight, -rank ** -0.5, rank ** -0.5)
        with torch.no_grad():
            self.step.bias.copy_(step_bias(c.width))
        self.sizes = (rank, c.states, c.states)

    def forward(self, x: Tensor) -> Three:
        """x [B,L,E] -> step [B,L,E], written [B,L,N], read [B,L,N]."""
        low, write, read = self.low(x).split(self.sizes, -1)
        return F.softplus(self.step(low).float()), write.float(), read.float()


class Fixed(Part):
    """The same for every token: what is left is a linear time-invariant convolution, S4's (the ablation of section 3.2)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        states: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.bias = nn.Parameter(step_bias(c.width))
        self.write, self.read = nn.Parameter(torch.ones(c.states)), nn.Parameter(torch.randn(c.states) * c.states ** -0.5)

    def forward(self, x: Tensor) -> Three:
        tokens = x.shape[:2]
        return F.softplus(self.bias).expand(*tokens, -1), self.write.expand(*tokens, -1), self.read.expand(*tokens, -1)


class Mixer(Part):
    """out(silu(z) * ssm(silu(conv(x)))), x and z = W u: [B,L,D] -> [B,L,D] (figure 3).

    h_t = exp(step A) h_{t-1} + step B x_t,  y_t = C h_t + D x_t, with A = -exp(decay), decay = log(1..N) at birth (equations 1 and 4).
    """
    undecayed = ("decay", "through")         # never shrunk by weight decay

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the tower
        expand: int = 2
        states: int = 16
        kernel: int = 4
        select: Spec = field(default_factory=Selective.Config)

    def __init__(self, c: Config):
        super().__init__()
        inner = c.expand * c.width
        self.into, self.out = nn.Linear(c.width, 2 * inner, bias=False), nn.Linear(inner, c.width, bias=False)
        self.conv = nn.Conv1d(inner, inner, c.kernel, groups=inner)
        self.select = build(c.select, width=inner, states=c.states)
        self.decay = nn.Parameter(torch.arange(1, c.states + 1).float().log().expand(inner, -1).clone())
        self.through = nn.Parameter(torch.ones(inner))
        self.kernel, self.inner, self.states = c.kernel, inner, c.states

    def start(self, batch: int) -> State:
        """Nothing was read yet."""
        like = self.decay
        return like.new_zeros(batch, self.inner, self.kernel - 1), like.new_zeros(batch, self.inner, self.states)

    def forward(self, u: Tensor) -> Tensor:
        return self.remember(u, None)[0]

    def remember(self, u: Tensor, state: State | None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """u [B,L,D] behind `state`, mask [B,L] (real tokens stand first) -> [B,L,D], and the state behind the last real token."""
        x, z = self.into(u).chunk(2, -1)
        past, h = state or self.start(len(u))
        heard = torch.cat([past.to(x.dtype), x.mT], -1)                                # [B,E,K-1+L]
        x = F.silu(self.conv(heard)).mT
        step, write, read = self.select(x)
        a = torch.exp(step[..., None] * -torch.exp(self.decay.float()))
        hs = scan(a, (step * x.float())[..., None] * write[:, :, None], h.float())
        y = ((hs * read[:, :, None]).sum(-1) + self.through * x.float()).to(u.dtype)
        count = torch.full((len(u),), u.shape[1], device=u.device) if mask is None else mask.sum(1)
        at = count[:, None] + torch.arange(self.kernel - 1, device=u.device)           # the last K-1 inputs up to the last real token
        behind = heard.gather(2, at[:, None].expand(-1, self.inner, -1)), hs[torch.arange(len(u), device=u.device), count - 1]
        return self.out(y * F.silu(z)), behind


class Block(Part):
    """u + mixer(norm(u))."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0
        norm: Spec = field(default_factory=lambda: RMSNorm.Config(eps=1e-5))
        mixer: Mixer.Config = field(default_factory=Mixer.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.mixer = build(c.norm, width=c.width), build(c.mixer, width=c.width)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.mixer(self.norm(u))

    def remember(self, u: Tensor, state: State | None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        y, behind = self.mixer.remember(self.norm(u), state, mask)
        return u + y, behind


class Mamba(Tower):
    """Causal language model without attention or positions (Gu & Dao 2023): embedding, blocks, RMSNorm, and the transposed embedding as head."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int                          # the most tokens it reads; no weight depends on it
        width: int
        depth: int
        block: Block.Config = field(default_factory=Block.Config)

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks: Any = nn.ModuleList(build(c.block, width=c.width) for _ in range(c.depth))
        for block in self.blocks:            # as GPT-2: what is added to the residual stream shrinks with the number of additions
            nn.init.kaiming_uniform_(block.mixer.out.weight, a=5 ** 0.5)
            block.mixer.out.weight.data.div_(c.depth ** 0.5)
        self.norm = build(c.block.norm, width=c.width)
        self.length, self.width, self.vocab = c.length, c.width, c.vocab

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Encoded:
        """text [B,L] ids, mask [B,L], padding on the right (None: all are real) -> tokens [B,L,D] (normed), pooled [B,D] (the last real one), mask.

        Raises UserError for ids outside the vocabulary and for more than `length` tokens.
        """
        check_text(text, self.length, self.vocab)
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Encoded(tokens=x, pooled=last_real(x, mask), mask=mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] -> [...,V]."""
        return F.linear(hidden, self.embed.weight)

    def read(self, text: Tensor, states: list[State] | None = None, mask: Tensor | None = None) -> tuple[Tensor, list[State]]:
        """text [B,L] behind what `states` remember -> hidden [B,L,D], and the states behind the last real token."""
        x, out = self.embed(text), list[State]()
        for i, block in enumerate(self.blocks):
            x, state = block.remember(x, states[i] if states else None, mask)
            out.append(state)
        return self.norm(x), out

    @torch.no_grad()
    def generate(self, text: Tensor, mask: Tensor | None = None, *, max_new: int, end: int | None, pad: int = 0, how: Spec | None = None) -> Tensor:
        """Continues text [B,L] (mask [B,L], padding on the right) by how: Greedy.Config (None), Nucleus.Config or Beam.Config of `towers.decoding`
        -> new ids [B,N], N <= max_new, up to and with `end`, then `pad`. Each new token costs the same, however long the text is."""
        if max_new < 1 or not text.shape[1]:
            raise UserError(f"max_new={max_new} behind {text.shape[1]} tokens", "ask for at least one token, behind at least one")
        check_text(text, self.length, self.vocab)
        hidden, states = self.read(text, None, mask)
        return (how or Greedy.Config()).build()(self.logits(last_real(hidden, mask)), Reader(self, states), max_new=max_new, end=end, pad=pad)


class Reader:
    """A `decoding.Writer` over the states of all blocks."""

    def __init__(self, lm: Mamba, states: list[State]):
        self.lm, self.states = lm, states

    def __call__(self, token: Tensor) -> Tensor:
        hidden, self.states = self.lm.read(token[:, None], self.states)
        return self.lm.logits(hidden[:, -1])

    def pick(self, rows: Tensor) -> None:
        self.states = [(conv[rows], h[rows]) for conv, h in self.states]
