"""CLIP's text tower with a learned context beside the name of a class (Zhou et al. 2022, CoOp). B texts, L tokens, M vectors, C classes, D width."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.nn.check import check_text
from polysense.towers.clip_text import ClipText
from polysense.towers.encoded import Encoded

PLACES = ("end", "middle", "front")


class ContextText(ClipText):
    """CLIP's text tower with a learned context: every text is read as the name of a class. Shapes: M vectors, C classes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ClipText.Config):
        context: int = 16                    # M
        place: str = "end"                   # of the name: behind all vectors, in the "middle" of them, or in "front"
        kind: str = "unified"                # one context for all classes, or a "specific" one for each
        classes: int = 10                    # C of the data that is learned from
        like: tuple[int, ...] = ()           # ids of the words that it begins as, again and again; (): random

    names: Tensor

    def __init__(self, c: Config):
        super().__init__(c)
        if c.place not in PLACES or c.kind not in ("unified", "specific") or not 0 <= c.context < c.length or c.classes < 1:
            raise UserError(f"place={c.place!r}, kind={c.kind!r}, context={c.context}, classes={c.classes}",
                            f"the place is one of {', '.join(PLACES)}, the kind unified or specific, and a name must fit behind the context")
        if any(not 0 <= i < c.vocab for i in c.like):
            raise UserError(f"like={c.like}", f"ids lie below {c.vocab}")
        rows = (c.context,) if c.kind == "unified" else (c.classes, c.context)
        self.context = nn.Parameter(torch.randn(*rows, c.width) * 0.02)
        self.register_buffer("names", torch.zeros(c.classes, c.length - c.context, dtype=torch.int64))       # what they are called; 0: nobody said
        self.place, self.like, self.specific, self.room = c.place, c.like, c.kind == "specific", c.length - c.context

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """CLIP's text tower has neither context nor names."""
        return weights | {k: v for k, v in self.state_dict().items() if k in ("context", "names") and k not in weights}

    @torch.no_grad()
    def begin(self) -> None:
        """The context begins as words, where some are given."""
        if self.like:
            word = self.embed.weight[torch.tensor(self.like, device=self.embed.weight.device)]
            self.context.copy_(word[torch.arange(self.context.shape[-2], device=word.device) % len(word)].expand_as(self.context))

    @torch.no_grad()
    def meet(self, names: Tensor) -> None:
        """names [C,L] ids, in the order of the labels, are what the classes are called. UserError for another number of them."""
        check_text(names, self.room, self.embed.num_embeddings)
        if len(names) != len(self.names):
            raise UserError(f"{len(names)} classes", f"this context was made for {len(self.names)}: set text.classes={len(names)}")
        self.names.copy_(self._plain(names))

    def _plain(self, text: Tensor) -> Tensor:
        """[B,L] -> [B,room], zeros behind the end: one name has one form."""
        real = torch.arange(text.shape[1], device=text.device) <= self.last(text)[:, None]
        return F.pad(text * real, (0, self.room - text.shape[1]))

    def numbers(self, text: Tensor) -> Tensor:
        """The classes [B] that texts [B,L] name. UserError for one that is no class of a specific context."""
        same = (self._plain(text)[:, None] == self.names).all(-1)
        if not bool(same.any(1).all()):
            raise UserError("a text is none of the classes that this context was learned for", "a class-specific context knows its own names only: "
                            "tell them, in the order of the labels, with system.text.meet(ids), or learn a unified one")
        return same.int().argmax(1)

    def forward(self, text: Tensor, short: bool = False, new: Tensor | None = None, number: Tensor | None = None) -> Encoded:
        """text [B,L] ids of names -> as ClipText, of M tokens more. number [B]: the class of each, known by its name where not given."""
        if new is not None:
            raise UserError("new words and a learned context", "use one of them")
        check_text(text, self.room, self.embed.num_embeddings)
        number = None if not self.specific else self.numbers(text) if number is None else number
        vectors = self.context.reshape(-1, self.width) if self.context.numel() else None
        return super().forward(self.prompted(text, number), short=short, new=vectors)

    def prompted(self, text: Tensor, number: Tensor | None = None) -> Tensor:
        """text [B,L], number [B] -> [B,M+L]: with the ids of the context's vectors, which lie behind the vocabulary.

        Whatever stands last before the end is taken for the full stop behind the name.
        """
        m, rows = self.context.shape[-2], len(text)
        new = self.embed.num_embeddings + torch.arange(m, device=text.device) + (0 if number is None else number[:, None] * m)
        first = {"end": m, "middle": m // 2, "front": 0}[self.place]
        before = torch.ones(rows, m, dtype=torch.int64, device=text.device)              # of each vector: how many tokens of the text
        before[:, first:] = (self.last(text) - 1).clamp(min=1)[:, None]
        keys = torch.cat([2 * before, (2 * torch.arange(text.shape[1], device=text.device) + 1).expand(rows, -1)], 1)
        return torch.cat([new.expand(rows, m), text], 1).gather(1, keys.argsort(dim=1, stable=True))

    def nearest(self) -> Tensor:
        """Ids of the words nearest to the vectors, [M] or [C,M] (section 4.4): to be looked at."""
        return torch.cdist(self.context.detach().float(), self.embed.weight.detach().float()).argmin(-1)
