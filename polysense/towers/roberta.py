"""RoBERTa's text tower: BERT with positions that are counted. Shapes: B batch, L tokens, D width."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polysense.towers.bert import Bert


def counted(text: Tensor, pad: int) -> Tensor:
    """text [B,L] ids -> rows of the position table [B,L]: `pad` + 1 for the first real token, one more for each behind it, `pad` for padding."""
    real = (text != pad).long()
    return real.cumsum(1) * real + pad


class Roberta(Bert):
    """Liu et al. 2019, released code: real tokens are counted from `pad` + 1 on, so that the table of positions has `length` + `pad` + 1 rows; one
    kind of segment, which says nothing."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Bert.Config):
        kinds: int = 1
        pad: int = 1

    def __init__(self, c: Config):
        super().__init__(c)
        self.position = nn.Parameter(torch.randn(1, c.length + c.pad + 1, c.width) * 0.02)

    def places(self, text: Tensor, start: int) -> Tensor:
        at = counted(text, self.pad)
        return self.position[0][torch.where(at > self.pad, at + start, at)]
