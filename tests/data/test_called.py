"""Pictures that get a new word as their caption."""
import numpy as np

from polysense.base.plan import WordsPlan
from polysense.data import source
from polysense.data.concept import TEMPLATES, called

WORD = WordsPlan(vocab=100, length=12, new=(("<it>", 1),))


def test_pictures_without_the_word_get_it_and_fill_a_batch():
    few = source("scenes:single?style=plain&size=32&n=5")
    made = called(few, WORD, 16)
    assert len(made) == 20 and {"image", "text"} <= set(made.offers)
    assert made[7]["captions"] == [t.format("<it>") for t in TEMPLATES["object"]]
    assert all(np.array_equal(np.asarray(made[i]["image"]), np.asarray(few[i % 5]["image"])) for i in (0, 4, 5, 19))


def test_captions_that_have_it_stay():
    made = called(source("scenes:single?style=plain&size=32&n=5"), WORD, 16)
    assert called(made, WORD, 64) is made
