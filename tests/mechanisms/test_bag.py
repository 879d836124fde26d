"""Texts as bags of words."""
import torch

from polysense.mechanisms.bag import bag


def test_only_real_words_of_the_own_row_are_drawn_evenly():
    torch.manual_seed(0)
    text = torch.tensor([[1, 5, 6, 7, 2, 0], [1, 8, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]])
    drawn = bag(text, text > 2, 3000)
    assert drawn.shape == (3, 3000) and set(drawn[1].tolist()) == {8} and set(drawn[2].tolist()) == {1}
    assert all(abs((drawn[0] == k).float().mean() - 1 / 3) < 0.04 for k in (5, 6, 7))
