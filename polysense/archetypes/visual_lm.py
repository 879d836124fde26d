"""A language model that is shown pictures. Abstract: a system adds its objectives and is final.

Shapes: B batch, N pictures a sample, P tokens a picture, L tokens of text, T tokens after splicing, D width of the language model.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.system import Spec, System
from polysense.mechanisms.bag import bag
from polysense.objectives.language import IGNORE, next_token, token_log_likelihood

TOLD = 16                                    # words told in the place of a picture


class VisualLM(System):
    """`vision` (picture -> tokens of its places), `connector` (to the width of the language model) and `language` (a CausalLM).

    In a text the id `image_token` holds the place of a picture: its P projected tokens are spliced in there, in the order of the places.
    Places may stand anywhere, any number of them in a text; a text without one passes untouched.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vision: Spec                         # PatchTokens, or what has its interface: image [B,3,H,W] -> [B,P,.]
        connector: Spec
        language: Spec                       # CausalLM.Config
        image_token: int
        end: int = 2                         # ids of the end token and of padding
        pad: int = 0

    def __init__(self, c: Config):
        super().__init__()
        self.vision, self.connector, self.language = c.vision.build(), c.connector.build(), c.language.build()
        self.image_token, self.end, self.pad = c.image_token, c.end, c.pad

    def see(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] or [B,N,3,H,W] -> [B,N,P,D], in the space of the word embeddings."""
        images = image[:, None] if image.ndim == 4 else image
        if images.ndim != 5:
            raise UserError(f"an image tensor of shape {list(image.shape)}", "give [B,3,H,W], or [B,N,3,H,W] for several pictures in a text")
        return self.connector(self.vision(images.flatten(0, 1))).unflatten(0, images.shape[:2])

    def splice(self, image: Tensor | None, text: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings x [B,T,D], mask [B,T] (True: real) and labels [B,T] of text [B,L] with its pictures in place; labels are IGNORE there.

        T is the longest row, L - places + places * P, cut to what the language model reads. Without any place the pictures are not even
        encoded. Raises UserError where a text has another number of places than pictures (none is fine) and for ids outside the vocabulary.
        """
        here = text == self.image_token
        if text.ndim != 2 or text.dtype != torch.int64:
            raise UserError(f"a text tensor of shape {list(text.shape)} and type {text.dtype}", "give token ids, int64 [B,L]")
        plain = text.masked_fill(here, self.pad)
        if plain.device.type == "cpu" and plain.numel() and not 0 <= int(plain.min()) <= int(plain.max()) < self.language.vocab:
            raise UserError(f"a token id is outside the vocabulary of {self.language.vocab}", "use the tokenizer that belongs to these weights")
        words, mask = self.language.embed(plain), text != self.pad
        if not bool(here.any()):
            return self._cut(words, mask, label)
        seen, n = self.see(self._wanted(image, here, text)), here.sum(1)
        if bool(((n > 0) & (n != seen.shape[1])).any()):
            raise UserError(f"a text has {sorted(set(n.tolist()))} places for {seen.shape[1]} pictures", "give one place to every picture")
        return self._placed(seen, text, words, mask, label)

    def _placed(self, seen: Tensor, text: Tensor, words: Tensor, mask: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is seen [B,N,P,D] in the N places of text [B,L], whose embeddings are words [B,L,D]."""
        here, per, seen = text == self.image_token, seen.shape[2], seen.flatten(1, 2)
        width = torch.where(here, per, 1)
        ends = width.cumsum(1)                                                            # where each token of the text ends after splicing
        at = torch.arange(int(ends[:, -1].max()), device=text.device).expand(len(text), -1).contiguous()
        source = torch.searchsorted(ends, at, right=True).clamp(max=text.shape[1] - 1)    # which token of the text each place belongs to
        picture = here.gather(1, source) & (at < ends[:, -1:])
        nth = (here.cumsum(1) - 1).gather(1, source) * per + at - (ends - width).gather(1, source)
        wide = (len(text), at.shape[1], words.shape[2])
        x = torch.where(picture[..., None], seen.gather(1, nth.clamp(0, seen.shape[1] - 1)[..., None].expand(wide)).to(words.dtype),
                        words.gather(1, source[..., None].expand(wide)))
        label = None if label is None else label.gather(1, source).masked_fill(picture | (at >= ends[:, -1:]), IGNORE)
        return self._cut(x, (mask.gather(1, source) | picture) & (at < ends[:, -1:]), label)

    def _wanted(self, image: Tensor | None, here: Tensor, text: Tensor) -> Tensor:
        if image is None or len(image) != len(text):
            raise UserError(f"{len(text)} texts with places for pictures, {0 if image is None else len(image)} samples of pictures", "give as many")
        return image

    def _cut(self, x: Tensor, mask: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        most = self.language.length
        return x[:, :most], mask[:, :most], None if label is None else label[:, :most]

    def nll(self, image: Tensor | None, text: Tensor, learned: Tensor) -> Tensor:
        """Mean -log p of the tokens of text [B,L] where `learned` [B,L] is true, given the pictures and all tokens before: a scalar."""
        x, mask, label = self.splice(image, text, text.masked_fill(~learned, IGNORE))
        assert label is not None
        return next_token(self.language.logits(self.language.read(x, mask)), label)

    def blind_nll(self, text: Tensor) -> Tensor:
        """`nll` of text [B,L] with its pictures taken away, over every token but the first and padding: a scalar."""
        unseen = text.masked_fill(text == self.image_token, self.pad)
        learned = unseen != self.pad
        learned[:, 0] = False
        return self.nll(None, unseen, learned)

    def told_nll(self, text: Tensor, said: Tensor, real: Tensor) -> Tensor:
        """`nll` of text [B,L] over every token but the first, padding and places, where a bag of words is told in the place of its picture: as
        many as TOLD of said [B,M] that are `real` [B,M]. What a language model that has read much can do: use what stands in its context."""
        plain, here = text.masked_fill(text == self.image_token, self.pad), text == self.image_token
        label = plain.masked_fill((text == self.pad) | here, IGNORE)
        label[:, 0] = IGNORE
        told = self.language.embed(bag(said, real, TOLD))[:, None]
        x, mask, placed = self._placed(told, text, self.language.embed(plain), text != self.pad, label)
        assert placed is not None
        return next_token(self.language.logits(self.language.read(x, mask)), placed)

    def log_likelihood(self, image: Tensor | None, text: Tensor, learned: Tensor) -> Tensor:
        """Sum of log p of the learned tokens of each sample, [B]: candidate answers are ranked by it."""
        x, mask, label = self.splice(image, text, text.masked_fill(~learned, IGNORE))
        assert label is not None
        return token_log_likelihood(self.language.logits(self.language.read(x, mask)), label)

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """image [B,3,H,W] or [B,N,3,H,W], prompt [B,L] ids (right-padded) -> new ids [B,M], M <= max_new, up to and with the end, then padding.

        A prompt without a place shows the picture behind its first token. how: a strategy of `towers.decoding`, greedy by default.
        """
        if not bool((prompt == self.image_token).any()):
            places = prompt.new_full((len(prompt), 1 if image.ndim == 4 else image.shape[1]), self.image_token)
            prompt = torch.cat([prompt[:, :1], places, prompt[:, 1:]], 1)
        x, mask, _ = self.splice(image, prompt)
        return self.language.generate(x, mask, max_new=max_new, end=self.end, pad=self.pad, how=how)
