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
        which, how, random = self.draw(text)
        chosen = (which < self.share) & free
        hidden = torch.where(chosen & (how < 0.8), self.mask, text)
        return torch.where(chosen & (how >= 0.9), random, hidden), chosen

    def draw(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hook: for each token two numbers in [0, 1), which tokens are chosen and what becomes of them, and a random id. [B,L] each."""
        which, how = torch.rand(text.shape, device=text.device), torch.rand(text.shape, device=text.device)
        return which, how, torch.randint(self.vocab, text.shape, device=text.device)


class PureWordMask(WordMask):
    """Every chosen word becomes the mask token: none of them is read (Bao et al. 2022, VL-BEiT; Wang et al. 2023, BEiT-3: half of the words of a
    pair)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(WordMask.Config):
        pass

    def draw(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.rand(text.shape, device=text.device), torch.zeros(text.shape, device=text.device), text


class WholeWordMask(WordMask):
    """All pieces of a chosen word are guessed; what becomes of each is drawn as before (BERT's later release; Bao et al. 2022, VLMo)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(WordMask.Config):
        pass

    def forward(self, text: Tensor, word: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """text [B,L] ids, word [B,L]: which word each token is a piece of, -1 for none (None: each token is one) -> as WordMask's."""
        if word is None:
            return super().forward(text)
        chosen = (torch.rand(text.shape, device=text.device) < self.share).gather(1, word.clamp(min=0)) & (word >= 0)
        _, how, random = self.draw(text)
        hidden = torch.where(chosen & (how < 0.8), self.mask, text)
        return torch.where(chosen & (how >= 0.9), random, hidden), chosen


class StaticWordMask(WordMask):
    """The masks of the first BERT, drawn once when the data were prepared: each text has `copies` masks for good, one of which is drawn (the
    authors' ten; with 1 a text is always masked alike). What is drawn is a hash of the text's words, of the place and of the copy's number."""

    @dataclass(frozen=True, kw_only=True)
    class Config(WordMask.Config):
        copies: int = 10

    def __init__(self, c: Config):
        super().__init__(c)
        if c.copies < 1:
            raise UserError(f"{c.copies} masks of each text", "there is one at least")
        self.copies = c.copies

    def draw(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.arange(1, text.shape[1] + 1, device=text.device)
        words = text.masked_fill(torch.isin(text, torch.tensor(self.special, device=text.device)), 0)
        copy = torch.randint(self.copies, (len(text), 1), device=text.device)
        seed = _mixed((words * _mixed(place)).sum(1, keepdim=True) ^ _mixed(copy + 1))     # padding, a special token, adds nothing
        which, how, word = (_mixed(seed ^ _mixed(3 * place + k)) & (2 ** 53 - 1) for k in range(3))
        return which.double() / 2 ** 53, how.double() / 2 ** 53, word % self.vocab


def _mixed(x: Tensor) -> Tensor:
    """int64 -> int64 that looks random (the finaliser of Steele et al. 2014, SplitMix; products wrap around)."""
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
