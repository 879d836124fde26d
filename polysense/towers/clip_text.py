"""CLIP's text tower. Shapes: B batch, L tokens, D width."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.spec import Spec
from polysense.nn.check import check_text
from polysense.nn.transformer import Transformer
from polysense.towers.encoded import Encoded, Tower


class ClipText(Tower):
    """A causal transformer; the text feature is the final-norm token at the end of the text (Radford et al. 2021, section 2.4).

    No token sees a later one, so what follows the end (padding with any id) changes nothing and batches may be trimmed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        length: int                          # the most tokens it reads
        body: Transformer.Config
        end: int | None = None               # id of the end token, its first position counts; None: the largest id of each text (OpenAI's files)

        @property
        def width(self) -> int:
            return self.body.width

    causal = True                            # no token sees a later one

    def __init__(self, c: Config):
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.randn(1, c.length, c.width) * 0.01)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.body = c.body.build()
        self.length, self.end, self.width = c.length, c.end, c.width

    def forward(self, text: Tensor, short: bool = False, new: Tensor | None = None) -> Encoded:
        """text [B,L] ids, L <= length -> tokens [B,L,D] (normed), pooled [B,D], mask [B,L] (True up to and with the end token).

        new [N,D]: embeddings of words learned later; ids from the vocabulary on are its rows (textual inversion).
        short: only `pooled` is wanted; the last block computes nothing else and tokens are [B,1,D].
        Raises UserError for a longer text. A text without the end token is read at its first position.
        """
        vocab = self.embed.num_embeddings
        check_text(text, self.length, vocab + (0 if new is None else len(new)))
        x, last = self.embed(text if new is None else text.clamp(max=vocab - 1)), self.last(text)
        if new is not None:
            x = torch.where((text >= vocab)[..., None], new[(text - vocab).clamp(min=0)].to(x.dtype), x)
        x = x + self.position[:, :text.shape[1]]
        if short:
            x = self.body(x, causal=self.causal, at=last)
            return Encoded(tokens=x, pooled=x[:, 0])
        x = self.body(x, causal=self.causal)
        mask = torch.arange(text.shape[1], device=text.device) <= last[:, None]
        return Encoded(tokens=x, pooled=x[torch.arange(len(x), device=x.device), last], mask=mask)

    def pooled(self, text: Tensor, /) -> Tensor:
        """text [B,L] -> `self(text).pooled` [B,D], the same numbers for less."""
        return self(text, short=True).pooled

    def last(self, text: Tensor) -> Tensor:
        """text [B,L] -> position of the end token [B]."""
        text = text * (text < self.embed.num_embeddings)       # words learned later are no end, however large their ids
        return text.argmax(1) if self.end is None else (text == self.end).int().argmax(1)
