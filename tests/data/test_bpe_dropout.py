"""BPE-dropout: several spellings of the same words, decided by (seed, position) alone, in training only."""
import numpy as np
import pytest
import torch

from polysense.base.errors import UserError
from polysense.base.plan import DropoutPlan, Feed, ImagePlan, TextPlan
from polysense.data import source
from polysense.data.bpe_dropout import Splitter
from polysense.data.loader import Loader
from polysense.data.tokenizer import make_tokenizer

TEXTS = ["a small red circle", "two blue stars &amp; one heart", "it's LEFT of the\ngreen square", "\N{SNOWMAN} stars", "red " * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TextPlan(vocab=200, length=24), [*TEXTS[:3], "green circles and squares, stars of blue"] * 3)


def rngs(seed: int, n: int = len(TEXTS)):
    return [np.random.default_rng([seed, i]) for i in range(n)]


def test_without_chance_it_is_the_tokenizer_itself(tokenizer):
    for got, want in zip(Splitter(tokenizer, 0.0).encode(TEXTS, rngs(0)), tokenizer.encode(TEXTS), strict=True):
        assert torch.equal(got, want)


def test_dropped_merges_spell_the_same_words_in_smaller_parts(tokenizer):
    split, whole = Splitter(tokenizer, 0.3), tokenizer("two blue stars")[0]
    rows = [split.encode(["two blue stars"], rngs(s, 1))[0][0] for s in range(40)]
    assert {tokenizer.decode(r) for r in rows} == {"two blue stars"}
    assert min(len(r) for r in rows) == len(whole) and len({tuple(r.tolist()) for r in rows}) > 10
    assert all(r[0] == tokenizer.start and r[-1] == tokenizer.end for r in rows)


def test_each_merge_is_left_out_as_often_as_asked(tokenizer):
    """"of" needs one merge, so its share of whole spellings is one minus the chance."""
    split = Splitter(tokenizer, 0.25)
    whole = [len(split.word("of", np.random.default_rng(i))) == 1 for i in range(2000)]
    assert len(tokenizer("of")[0]) == 3 and np.mean(whole) == pytest.approx(0.75, abs=0.03)


def test_batches_are_decided_by_seed_and_position_and_exams_read_plainly():
    words, data = DropoutPlan(vocab=200, length=24, dropout=0.5), source("scenes:single?n=8&captions=1")
    feed, tokenizer = Feed(image=ImagePlan(size=16), text=words), make_tokenizer(words.plain, data.captions())

    def texts(train: bool, seed: int = 0, **place: int) -> torch.Tensor:
        return next(iter(Loader(data, feed, tokenizer, batch_size=4, seed=seed, train=train, needs=("text",), **place)))["text"]
    once, again, other = texts(True), texts(True), texts(True, seed=1)
    assert torch.equal(once, again) and not torch.equal(once[:, :5], other[:, :5])
    second = texts(True, rank=1, world=2)
    assert torch.equal(second, once[2:, :second.shape[1]])
    assert torch.equal(texts(False), tokenizer([data[i]["captions"][0] for i in range(4)]))


def test_what_cannot_be_split_is_refused(tokenizer):
    with pytest.raises(UserError, match="from 0 to below 1"):
        Splitter(tokenizer, 1.0)
    with pytest.raises(UserError, match="plain byte-pair"):
        Splitter(make_tokenizer(TextPlan(kind="wordpiece", vocab=200, length=24), TEXTS), 0.1)
