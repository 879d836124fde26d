"""Which words of a text are hidden. Shapes: B batch, L tokens."""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Spec
from polysense.base.system import Part


class WordMask(Part):
    """BERT's corruption (Devlin et al. 2019, section 3.1): each word is chosen with chance `share`; of the chosen 80 % become the mask token,
    10 % a random token, 10 % stay. Special tokens are never chosen. Random numbers come from torch's global generator."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        vocab: int
        mask: int                            # id of [MASK]: 103 in BERT's vocabulary, 4 in those trained here
        special: tuple[int, ...]             # ids that stay: padding, start, end
        share: float = 0.15

    def __init__(self, c: Config):
        super().__init__()
        if not 0 < c.share < 1 or not 0 <= c.mask < c.vocab:
            raise UserError(f"share={c.share} and mask={c.mask} of {c.vocab} ids hide no words", "share lies in (0, 1), mask is an id")
        self.vocab, self.mask, self.special, self.share = c.vocab, c.mask, c.special, c.share

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B,L] ids -> (corrupted ids [B,L], chosen [B,L], True where the word is to be guessed)."""
        free = ~torch.isin(text, torch.tensor(self.special, device=text.device))
        chosen = (torch.rand(text.shape, device=text.device) < self.share) & free
        how = torch.rand(text.shape, device=text.device)
        hidden = torch.where(chosen & (how < 0.8), self.mask, text)
        random = torch.randint(self.vocab, text.shape, device=text.device)
        return torch.where(chosen & (how >= 0.9), random, hidden), chosen
