"""One Multiway encoder that learns from pictures, texts and pairs of both by guessing what is hidden. Abstract: a system adds its objectives.

Shapes: B batch, N patches, L tokens, M hidden patches and W hidden words of the whole batch, K codes, V vocabulary, D width, E joint space.
"""
from dataclasses import dataclass, field
from math import log
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Losses, Spec, System
from polysense.decoders.codes import CodeHead
from polysense.mechanisms.mask_sampler import FillHidden
from polysense.nn.build import build
from polysense.nn.masking import Masking
from polysense.objectives.codes import masked_ce
from polysense.objectives.contrastive import info_nce
from polysense.objectives.language import hidden_words
from polysense.towers.multiway import Fill, Multiway

SHARED = ("net.kind.weight", "net.body.blocks.*.norm1.*", "net.body.blocks.*.attn.*", "net.body.blocks.*.scale?", "net.body.norm.*",
          "net.body.relative.table")         # parameters of a shared Multiway transformer that every route reads
SINGLE = (*SHARED, "net.image.*", "net.text.*", "net.body.blocks.*.image.*", "net.body.blocks.*.text.*", "image_head.*", "text_head.*",
          "log_scale")                       # and those that pictures and texts alone read: what `compare` trains


class Parts(NamedTuple):
    """Rows of a batch that are pictures alone, texts alone, and pairs, int each."""
    pictures: Tensor
    texts: Tensor
    pairs: Tensor


class UnifiedEncoder(System):
    """`net` reads a picture, a text, or a pair; what it is given says which experts work. `codes` names the visual codes (`target`: a frozen
    tokenizer) of hidden patches, `words` hidden words; two heads lead its first tokens into a joint space.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        net: Multiway.Config
        target: Spec                         # CodeTarget
        sampler: Spec                        # BlockMask
        words: Spec                          # WordHead, or one of its kind
        hide_text: Spec                      # WordMask, for texts alone
        image_head: Spec
        text_head: Spec
        hide: Spec = field(default_factory=FillHidden.Config)
        codes: Spec = field(default_factory=CodeHead.Config)
        scale: float = 1 / 0.07
        max_scale: float = 100.0

    def __init__(self, c: Config):
        super().__init__()
        wide = c.net.width
        self.net, self.target, self.sampler = c.net.build(), c.target.build(), c.sampler.build()
        self.hide, self.codes = build(c.hide, width=wide), build(c.codes, into=wide, out=c.target.width)  # type: ignore[attr-defined]
        self.words, self.hide_text = build(c.words, width=wide, vocab=c.net.text.vocab), c.hide_text.build()
        self.image_head, self.text_head = c.image_head.build(), c.text_head.build()
        self.log_scale, self.max_log_scale = nn.Parameter(torch.tensor(log(c.scale))), log(c.max_scale)

    @property
    def scale(self) -> Tensor:
        """1 / temperature, never above `max_scale`."""
        return self.log_scale.clamp(max=self.max_log_scale).exp()

    def parts(self, batch: Batch) -> Parts:
        """Which rows are what: as the data say (`has`), or every third of captioned pictures gives its picture alone, every third its text."""
        has = batch["has"] if "has" in batch else torch.arange(len(batch["image"]), device=batch["image"].device) % 3
        return Parts(*((has == role).nonzero()[:, 0] for role in (1, 2, 0)))

    def masking(self, image: Tensor) -> Masking:
        """A new random choice of hidden patches for every picture."""
        return self.sampler(len(image), self.net.grid_of(image), image.device)

    def fill(self, masking: Masking) -> Fill:
        """What the encoder is given in place of hidden patches."""
        return masking.mask, self.hide.token

    def code_loss(self, tokens: Tensor, image: Tensor, masking: Masking) -> Tensor:
        """-mean log p of the codes of hidden patches; tokens [B,1+N,D] of a picture whose patches were hidden, image as it was."""
        return masked_ce(self.codes(tokens, masking), self.target(image, masking))

    def word_logits(self, tokens: Tensor) -> Tensor:
        """States [W,D] -> logits [W,V]."""
        return self.words(tokens, self.net.text.embed.weight)

    def picture_loss(self, image: Tensor) -> Tensor:
        """Masked image modelling on pictures alone (Bao et al. 2022, BEiT)."""
        masking = self.masking(image)
        return self.code_loss(self.net(image, fill=self.fill(masking)).image, image, masking)

    def text_loss(self, text: Tensor, *word: Tensor) -> Tensor:
        """Masked language modelling on texts alone (Devlin et al. 2019). word: what else `hide_text` reads."""
        hidden, chosen = self.hide_text(text, *word)
        return hidden_words(self.word_logits(self.net(text=hidden).text[chosen]), text[chosen])

    def pair_losses(self, image: Tensor, text: Tensor, hide: Any) -> tuple[Tensor, Tensor]:
        """Both sides of every pair are hidden in part, and each is guessed from what is left of both: (words, codes). hide: a WordMask."""
        masking, (hidden, chosen) = self.masking(image), hide(text)
        seen = self.net(image, hidden, fill=self.fill(masking))
        return hidden_words(self.word_logits(seen.text[chosen]), text[chosen]), self.code_loss(seen.image, image, masking)

    def masked_losses(self, batch: Batch, hide: Any) -> Losses:
        """Of every part of a batch its own term, alike weighted; a part without a sample has none. Fillers are not read."""
        image, text, part, out = batch["image"], batch["text"], self.parts(batch), Losses()
        if len(part.pairs):
            words, codes = self.pair_losses(image[part.pairs], text[part.pairs], hide)
            out["pair"] = words + codes
        if len(part.texts):
            out["text"] = self.text_loss(text[part.texts])
        if len(part.pictures):
            out["image"] = self.picture_loss(image[part.pictures])
        return out

    def guess(self, image: Tensor, text: Tensor, hidden: Tensor) -> Tensor:
        """image [B,3,H,W], text [B,L], hidden bool [B,L], words that are not read -> logits [W,V], row by row."""
        return self.word_logits(self.net(image, text.masked_fill(hidden, self.hide_text.mask)).text[hidden])

    def guess_words(self, text: Tensor, hidden: Tensor) -> Tensor:
        """text [B,L] ids, hidden bool [B,L]: the words to be guessed, which are not read -> probabilities [W,V], row by row."""
        return self.word_logits(self.net(text=text.masked_fill(hidden, self.hide_text.mask)).text[hidden]).softmax(-1)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,E], unit norm: the first token, read by the experts for pictures alone."""
        return unit(self.image_head(self.net.pooled(image)))

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] -> [B,E], unit norm: the first token, read by the experts for texts alone."""
        if text.is_floating_point():
            raise UserError(f"a text tensor of type {text.dtype}", "this tower reads token ids, int64 [B,L]")
        return unit(self.text_head(self.net.pooled(text)))

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """`image` and `text`, unit norm [B,E]."""
        return {"image": self.encode_image(batch["image"]), "text": self.encode_text(batch["text"])}

    def compare(self, seen: dict[str, Tensor]) -> Losses:
        """Tuning as a dual encoder: the symmetric cross-entropy over all pairs of the global batch."""
        return Losses(contrast=info_nce(seen["image"], seen["text"], self.scale))

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        self.log_scale.clamp_(max=self.max_log_scale)


def unit(x: Tensor) -> Tensor:
    """x [B,E] -> rows of length 1, in float32 whatever the autocast type."""
    return F.normalize(x.float(), dim=-1)


def paired(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures and texts with equally many rows: a single one of either goes with all of the other. UserError where they do not pair."""
    if len(image) != len(text) and 1 not in (len(image), len(text)):
        raise UserError(f"{len(image)} pictures and {len(text)} texts cannot be paired", "give equally many, or one of either")
    n = max(len(image), len(text))
    return image.expand(n, *[-1] * (image.ndim - 1)), text.expand(n, -1)

