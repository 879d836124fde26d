"""A text decoder that reads a picture, or anything else that is a list of tokens. Shapes: B batch, L tokens, S source tokens, V vocabulary."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.spec import Spec
from polysense.base.system import Part
from polysense.nn.build import build
from polysense.nn.cache import Cache
from polysense.towers.bert import Bert
from polysense.towers.decoding import Greedy


class CaptionDecoder(Part):
    """A BERT whose blocks see no later word and read a source by cross-attention, and a word predictor: ALBEF's answer decoder (Li et al. 2021,
    section 3.4), BLIP's captioner. Texts begin with `start` and end with `end`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        text: Bert.Config                    # its blocks have `cross`
        words: Spec                          # a WordHead, which shares the embeddings of `text`
        start: int
        end: int

    def __init__(self, c: Config):
        super().__init__()
        self.text, self.start, self.end, self.pad = c.text.build(), c.start, c.end, c.text.pad
        self.words = build(c.words, width=c.text.width, vocab=c.text.vocab)

    def forward(self, text: Tensor, source: Tensor, source_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """text [B,L] ids, source [B,S,.], source_mask [B,S] -> logits [B,L,V] of the token after each."""
        said = self.text(text, source=source, source_mask=source_mask, causal=True, cache=cache)
        return self.words(said.tokens, self.text.embed.weight)

    @torch.no_grad()
    def write(self, source: Tensor, source_mask: Tensor | None = None, *, max_new: int, prompt: Tensor | None = None,
              how: Spec | None = None) -> Tensor:
        """source [B,S,.] -> ids [B,N], N <= max_new, up to and with `end`, then padding. prompt [B,P]: words after `start` that are given, all real.

        how: Greedy.Config (None), Nucleus.Config or Beam.Config of `towers.decoding`. The key-value cache makes a step cost one token.
        """
        first = torch.full((len(source), 1), self.start, device=source.device)
        text = first if prompt is None else torch.cat([first, prompt], 1)
        cache = self.text.body.cache(len(source), text.shape[1] + max_new)
        writer = Reading(self, source, source_mask, cache)
        return (how or Greedy.Config()).build()(writer.read(text), writer, max_new=max_new, end=self.end, pad=self.pad)


class Reading:
    """A `decoding.Writer`: the decoder, what it reads, and the key-value cache of what it has written."""

    def __init__(self, decoder: CaptionDecoder, source: Tensor, source_mask: Tensor | None, cache: Cache):
        self.decoder, self.source, self.source_mask, self.cache = decoder, source, source_mask, cache

    def read(self, text: Tensor) -> Tensor:
        """text [B,L] more ids -> logits [B,V] of the next."""
        return self.decoder(text, self.source, self.source_mask, self.cache)[:, -1]

    def __call__(self, token: Tensor) -> Tensor:
        return self.read(token[:, None])

    def pick(self, rows: Tensor) -> None:
        self.cache.pick(rows)
        self.source = self.source[rows]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
