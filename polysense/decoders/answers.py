"""Answers to questions as classes that become known while training meets them. Shapes: B batch, L tokens, A room for answers, D width."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.base.system import Part

NONE = -1                                    # the place of an answer for which there is no room


class KnownAnswers(Part):
    """A classifier over `room` answers: out(gelu(norm(pre x))), and the words of each (VQA 2.0: 3129 of them).

    `words` [A,length] ids, 0 where there is none yet. An answer that is new takes the next free place, in the order of the batch; once all places are
    taken, new ones count for nothing. `places` is a pure function of what is known; `learn` keeps it, after the step.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        width: int = 0                       # 0: set by the owner
        room: int = 256
        length: int = 8                      # tokens of an answer that are kept, start and end included
        eps: float = 1e-5
        std: float = 0.02

    words: Tensor

    def __init__(self, c: Config):
        super().__init__()
        self.pre, self.norm, self.out = nn.Linear(c.width, 2 * c.width), nn.LayerNorm(2 * c.width, eps=c.eps), nn.Linear(2 * c.width, c.room)
        for m in (self.pre, self.out):
            nn.init.trunc_normal_(m.weight, std=c.std)
            nn.init.zeros_(m.bias)
        self.register_buffer("words", torch.zeros(c.room, c.length, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,D] -> logits [B,A]."""
        return self.out(F.gelu(self.norm(self.pre(x))))

    def places(self, answer: Tensor) -> tuple[Tensor, Tensor]:
        """answer [B,L] ids, padded with 0 -> its place [B] (NONE: no room is left), and what `words` becomes [A,length]."""
        asked = F.pad(answer, (0, self.words.shape[1]))[:, :self.words.shape[1]]
        known = {tuple(w): i for i, w in enumerate(self.words.tolist()) if any(w)}
        table, rows = self.words.clone(), list[int]()
        for words in map(tuple, asked.tolist()):
            if words not in known and len(known) < len(table):
                known[words] = len(known)
                table[known[words]] = torch.tensor(words)
            rows.append(known.get(words, NONE))
        return torch.tensor(rows, device=answer.device), table

    def loss(self, x: Tensor, answer: Tensor) -> Tensor:
        """Cross-entropy of the places of the answers, places that no answer has left out; 0 where none of them has one."""
        rows, table = self.places(answer)
        logits = self(x).float().masked_fill(~table.bool().any(1).to(x.device), -1e4)
        return F.cross_entropy(logits, rows, ignore_index=NONE, reduction="sum") / (rows != NONE).sum().clamp(min=1)

    @torch.no_grad()
    def learn(self, answer: Tensor) -> None:
        """Keeps the answers [B,L] of a step."""
        self.words.copy_(self.places(answer)[1])

    @torch.no_grad()
    def say(self, x: Tensor) -> Tensor:
        """x [B,D] -> words [B,length] of the likeliest known answer, without the start token, padded with 0."""
        known = self.words.any(1)
        best = self(x).masked_fill(~known, -torch.inf).argmax(1)
        return F.pad(self.words[best][:, 1:], (0, 1))
