"""Writing with a network that guesses hidden words: a mask token behind what was written is guessed, again and again."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polysense.towers.multiway import prefix_sees


class AppendedMask:
    """A `decoding.Writer` over a Multiway tower (BEiT-3's captions; Bao et al. 2021, s2s-ft): the words so far and [MASK] see the picture and what
    stands before them; the logits are those at [MASK]. Shapes: B sequences, L words so far, V vocabulary.
    """

    def __init__(self, net: Any, words: Callable[[Tensor], Tensor], image: Tensor, text: Tensor, mask: int):
        self.net, self.words, self.image, self.text, self.mask = net, words, image, text, mask

    def logits(self) -> Tensor:
        """[B,V] of the next word."""
        grid = self.net.grid_of(self.image)
        text = torch.cat([self.text, self.text.new_full((len(self.text), 1), self.mask)], 1)
        sees = prefix_sees(1 + grid[0] * grid[1], text.shape[1], text.device)
        return self.words(self.net(self.image, text, sees=sees).text[:, -1])

    def __call__(self, token: Tensor) -> Tensor:
        self.text = torch.cat([self.text, token[:, None]], 1)
        return self.logits()

    def pick(self, rows: Tensor) -> None:
        self.image, self.text = self.image[rows], self.text[rows]
