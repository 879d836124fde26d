"""A second look in retrieval."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polysense.base.errors import UserError
from polysense.data.sources import BadSample
from polysense.tasks import take
from polysense.tasks.encode import Features
from polysense.tasks.rerank import Again, second_looks

N = 12


class Reader(nn.Module):
    """Cosines know a picture's parity alone; a second look knows everything."""

    def __init__(self):
        super().__init__()
        self.blind, self.looked, self.pictures = nn.Parameter(torch.zeros(())), 0, 0

    def encode_image(self, image):
        return F.one_hot(image[:, 0, 0, 0].long() % 2, 2).float() + self.blind

    def encode_text(self, text):
        return F.one_hot(text[:, 0] % 2, 2).float() + self.blind

    def match_text(self, image, text):
        assert len(image) == 1
        self.looked, self.pictures = self.looked + len(text), self.pictures + 1
        return torch.where(image[:, 0, 0, 0].long() == text[:, 0], 0.9, 0.1)


class Source:
    name, offers, classes = "numbers", ("image", "text"), ()

    def __init__(self, bad=()):
        self.bad = bad

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i in self.bad:
            raise BadSample(f"s{i}", "torn")
        return {"id": f"s{i}", "image": np.full((4, 4, 3), i, np.uint8), "captions": [f"{i} a", f"{i} b"]}


def subject(system):
    return SimpleNamespace(system=system, id="toy", read_texts=lambda texts: torch.tensor([[int(t.split()[0]), 1] for t in texts]),
                           read_images=lambda items: torch.from_numpy(np.stack(items)).permute(0, 3, 1, 2).float())


def test_the_second_look_decides_among_the_best_alone():
    plain = take("retrieval", subject(Reader()), Source())
    assert plain.metrics["text_to_image_r1"].value < 0.5
    all_six, few = (take("retrieval", subject(Reader()), Source(), rerank=k) for k in (N, 2))
    assert all_six.metrics["text_to_image_r1"].value == all_six.metrics["image_to_text_r1"].value == 1.0
    assert plain.metrics["text_to_image_r1"].value < few.metrics["text_to_image_r1"].value < 1
    assert all_six.notes["rerank"] == N and "rerank" not in plain.notes


def test_each_picture_is_read_once_and_pairs_are_not_judged_twice():
    system = Reader()
    take("retrieval", subject(system), Source(), rerank=3)
    assert system.pictures <= N and system.looked <= N * 3 + 2 * N * 3


def test_unreadable_pictures_do_not_shift_the_others():
    result = take("retrieval", subject(Reader()), Source(bad=(0, 5)), rerank=N)
    assert result.n == N - 2 and result.metrics["text_to_image_r1"].value == 1.0


def test_what_was_looked_at_stands_above_the_rest_in_its_own_order():
    cosines = torch.tensor([[0.9, 0.8, 0.7, -1.0]])
    lifted = Again(torch.tensor([[0, 1]]), torch.tensor([[1e-6, 3e-6]])).over(cosines, 0)
    assert lifted.argsort(descending=True).tolist() == [[1, 0, 2, 3]]


def test_it_asks_for_a_system_that_fuses_and_for_pictures():
    with pytest.raises(UserError, match="needs the pictures"):
        take("retrieval", subject(Reader()), Features("f", ("image", "text"), (), torch.eye(2), np.zeros(2, int), [["1 a"], ["2 b"]]), rerank=2)

    class Towers(nn.Module):
        encode_image, encode_text = Reader.encode_image, Reader.encode_text
    with pytest.raises(UserError, match="match_text"):
        take("retrieval", subject(Towers()), Source(), rerank=2)


def test_probabilities_that_are_no_numbers_are_refused():
    system = Reader()
    system.match_text = lambda image, text: torch.full((len(text),), torch.nan)
    with pytest.raises(UserError, match="not finite"):
        second_looks(subject(system), Source(), [0, 1], ["0 a", "1 a"], torch.eye(2), torch.eye(2), 2)
