"""One stream of text tokens and image tokens, written one after the other. Abstract: a system adds its objective and is final.

Shapes: B batch, L text tokens (start token first), N image tokens (side x side), T = L + N, V text vocabulary, K codes, D width.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.system import Spec, System
from polysense.nn.check import check_text
from polysense.nn.transformer import Transformer


class TokenGenerator(System):
    """A codec (frozen, through a Start: `codes`, `ids(image)`, `decode(ids)`), embeddings of text and codes, a causal body, a head for each.

    Texts are brought to L tokens: what stands behind the end token is padding, and every position has a padding token of its own, which is
    read, seen and predicted like any other (Ramesh et al. 2021, section 2.2). Image tokens know their row and their column.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        codec: Spec
        body: Transformer.Config
        text_vocab: int
        text_length: int
        side: int
        end: int = 2                         # id of the text's end token

    def __init__(self, c: Config):
        super().__init__()
        self.codec, self.body = c.codec.build(), c.body.build()
        width = c.body.width
        self.text_vocab, self.text_length, self.side, self.end = c.text_vocab, c.text_length, c.side, c.end
        self.words, self.codes = nn.Embedding(c.text_vocab + c.text_length, width), nn.Embedding(self.codec.codes, width)
        self.place, self.row, self.column = (nn.Embedding(n, width) for n in (c.text_length, c.side, c.side))
        self.text_head = nn.Linear(width, c.text_vocab + c.text_length)
        self.image_head = nn.Linear(width, self.codec.codes)
        for module in (self.words, self.codes, self.place, self.row, self.column, self.text_head, self.image_head):
            nn.init.normal_(module.weight, std=0.02)
        for head in (self.text_head, self.image_head):
            nn.init.zeros_(head.bias)

    def padded(self, text: Tensor) -> Tensor:
        """text [B,l] ids, l <= L, padded in any way behind its end token -> [B,L], padding as V + position. Raises UserError for what is no text."""
        check_text(text, self.text_length, self.text_vocab)
        over = ((text == self.end).cumsum(1) - (text == self.end).long()) > 0
        text = nn.functional.pad(text.long(), (0, self.text_length - text.shape[1]))
        over = nn.functional.pad(over, (0, self.text_length - over.shape[1]), value=True)
        return torch.where(over, self.text_vocab + torch.arange(self.text_length, device=text.device), text)

    def embed_text(self, padded: Tensor) -> Tensor:
        """padded [B,L] -> [B,L,D]."""
        return self.words(padded) + self.place.weight

    def embed_codes(self, codes: Tensor, start: int = 0) -> Tensor:
        """codes [B,n], the image tokens from number `start` on -> [B,n,D]."""
        at = torch.arange(start, start + codes.shape[1], device=codes.device)
        return self.codes(codes) + self.row(at // self.side) + self.column(at % self.side)

    def logits(self, padded: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """padded [B,L], codes [B,N] -> of text tokens 1..L-1 [B,L-1,V+L], of all image tokens [B,N,K], each given what comes before it."""
        stream = torch.cat([self.embed_text(padded), self.embed_codes(codes)[:, :-1]], 1)
        hidden = self.body(stream, causal=True)
        return self.text_head(hidden[:, :self.text_length - 1]), self.image_head(hidden[:, self.text_length - 1:])

    def look(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> codes [B,N] of the frozen codec, row by row. Raises UserError where the grid is another."""
        with torch.no_grad():
            ids = self.codec.ids(image)
        if ids.shape[1:] != (self.side, self.side):
            raise UserError(f"pictures of {ids.shape[1]}x{ids.shape[2]} codes", f"this system writes grids of {self.side}x{self.side}")
        return ids.flatten(1)

    @torch.no_grad()
    def draw(self, text: Tensor, temperature: float = 1.0) -> Tensor:
        """text [B,l] ids -> codes [B,side,side], drawn one by one with a key-value cache from torch's global random numbers."""
        padded, n = self.padded(text), self.side ** 2
        cache = self.body.cache(len(padded), self.text_length + n)
        hidden = self.body(self.embed_text(padded), causal=True, cache=cache)[:, -1:]
        drawn: list[Tensor] = []
        for i in range(n):
            chance = (self.image_head(hidden)[:, 0].float() / temperature).softmax(-1)
            drawn.append(torch.multinomial(chance, 1))
            if i < n - 1:
                hidden = self.body(self.embed_codes(drawn[-1], i), causal=True, cache=cache)
        return torch.cat(drawn, 1).unflatten(1, (self.side, self.side))
