"""The text tower of the first text-to-image latent diffusion model. Shapes: B batch, L tokens, D width."""
from dataclasses import dataclass

from torch import Tensor

from polysense.towers.clip_text import ClipText
from polysense.towers.encoded import Encoded


class OpenText(ClipText):
    """As CLIP's, but every token sees all others, padding too, since nothing is masked (Rombach et al. 2022, section 3.3 and released code).

    Texts are word pieces: a start, words, an end, padding. Where the end stands is read off the padding.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipText.Config):
        pad: int = 0

    causal = False

    def __init__(self, c: Config):
        super().__init__(c)
        self.pad = c.pad

    def last(self, text: Tensor) -> Tensor:
        """text [B,L] -> position of its last token that is no padding [B]."""
        return (text != self.pad).long().cumsum(1).argmax(1)

    def forward(self, text: Tensor, short: bool = False, new: Tensor | None = None) -> Encoded:
        """As ClipText's, without a mask: what follows the end is read."""
        return super().forward(text, short, new)._replace(mask=None)
