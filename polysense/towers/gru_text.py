"""A recurrent text tower. Shapes: B batch, L tokens, D width."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.nn.check import check_text
from polysense.towers.encoded import Encoded, Tower


class GruText(Tower):
    """Word embeddings through a gated recurrent unit; pooled is its state after the last real word (Faghri et al. 2018, section 3.4).

    Padding stands behind the text and is read by nobody: the state at the last word does not know what follows.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int
        width: int
        words: int = 300                     # width of the embeddings
        pad: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(c.vocab, c.words), nn.GRU(c.words, c.width, batch_first=True)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.length, self.pad, self.width = c.length, c.pad, c.width

    def forward(self, text: Tensor) -> Encoded:
        """text [B,L] ids -> tokens [B,L,D], pooled [B,D], mask [B,L]. Raises UserError for a longer text."""
        check_text(text, self.length, self.embed.num_embeddings)
        mask = text != self.pad
        tokens, _ = self.rnn(self.embed(text))
        return Encoded(tokens=tokens, pooled=tokens[torch.arange(len(text), device=text.device), mask.sum(1).clamp(min=1) - 1], mask=mask)
