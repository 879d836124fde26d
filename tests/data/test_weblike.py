"""Pairs of the web made fit for training, and sources mixed by share."""
import numpy as np
import pytest

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan, TextPlan
from polysense.base.telling import Cleaned, Mixed, ToldFeed, Triplets
from polysense.data.loader import Loader
from polysense.data.sources import ConcatSource, ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.data.told import told
from polysense.data.weblike import cleaned, tidy


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def pairs(*rows: tuple) -> ListSource:
    """(id, picture, captions) rows."""
    return ListSource("web", [{"id": i, "image": p, "captions": list(c)} for i, p, c in rows], ("image", "text"))


def kept(source) -> dict[str, list[str]]:
    return {source.id(i): source.about(i)["captions"] for i in range(len(source))}


@pytest.mark.parametrize(("text", "want"), [
    ("  a &amp;quot;red&amp;quot;\n\tcar ", 'a "red" car'), ("<b>big</b> sale http://shop.example/x?y=1 of hats", "big sale of hats"),
    ("IMG_1234.JPG", ""), ("photo 12", ""), ("caf\u00e9 \uff21", "caf\u00e9 A"), ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2")])
def test_alt_texts_are_made_tidy_once_and_for_all(text, want):
    assert tidy(text) == want and tidy(tidy(text)) == tidy(text)


def test_rules_on_texts_and_pictures():
    web = pairs(("ok", picture(0), ["a red car"]), ("short", picture(1), ["car"]), ("long", picture(2), [" ".join(["word"] * 9)]),
                ("numbers", picture(3), ["12 34 56"]), ("small", picture(4, (10, 40)), ["a blue car"]),
                ("wide", picture(5, (30, 130)), ["a wide car"]),
                ("file", picture(6), ["IMG_0001.jpg"]), ("both", picture(7), ["x", "two words", "two&nbsp;words"]))
    assert kept(cleaned(web, Cleaned(words=(2, 8), smallest=20, ratio=3.0))) == {"ok": ["a red car"], "both": ["two words"]}
    assert set(kept(cleaned(web, Cleaned()))) == {"ok", "short", "long", "small", "wide", "both"}
    with pytest.raises(UserError, match=r"no sample of web.*loosen"):
        cleaned(web, Cleaned(words=(50, 60)))


def test_exactly_one_of_several_copies_stays_whatever_their_order():
    rows = [("b", picture(0), ["a cat"]), ("a", picture(0), ["a cat"]), ("c", picture(0), ["a dog"]), ("d", picture(1), ["a cat"]),
            ("e", picture(0), ["a  cat"])]
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)):
        once = cleaned(pairs(*(rows[i] for i in order)), Cleaned(copies="one"))
        assert set(kept(once)) == {"a", "c", "d"}
        assert kept(cleaned(once, Cleaned(copies="one"))) == kept(once), "doing it again changes nothing"


class Judge:
    """A picture's mean brightness says which text fits it."""

    def score(self, source, base):
        raise AssertionError("entities are not asked for")

    def features(self, source, texts, rows):
        import torch

        light = [np.asarray(source.load(i, "image")).mean() > 128 for i in range(len(source))]
        seen = torch.tensor([[1.0, 0.0] if x else [0.0, 1.0] for x in light])
        return seen, torch.tensor([[1.0, 0.0] if "bright" in t else [0.0, 1.0] for t in texts])


def test_a_judge_leaves_out_what_does_not_fit_and_nobody_is_asked_without_one():
    light, dark = np.full((30, 30, 3), 250, np.uint8), np.full((30, 30, 3), 5, np.uint8)
    web = pairs(("0", light, ["a bright day"]), ("1", dark, ["a bright day"]), ("2", dark, ["the dark night"]), ("3", light, ["the dark night"]))
    feed = ToldFeed(image=ImagePlan(size=16), told=(Cleaned(fit=0.5),))
    assert set(kept(told(web, feed, Judge()))) == {"0", "2"}
    assert set(kept(told(web, feed))) == {"0", "1", "2", "3"}, "before a judge is there, as when a run begins"
    with pytest.raises(UserError, match="nobody judges"):
        cleaned(web, Cleaned(fit=0.5))


def test_parts_stand_in_every_batch_by_their_shares_however_large_they_are():
    captioned = pairs(*((f"c{i}", picture(i, (8, 8)), [f"caption {i}"]) for i in range(60)))
    labelled = ListSource("labels", [{"id": f"l{i}", "image": picture(100 + i, (8, 8)), "label": i % 2} for i in range(7)], ("image", "label"),
                          classes=("cat", "dog"))
    feed = ToldFeed(image=ImagePlan(size=8), text=TextPlan(vocab=200, length=16), told=(Triplets(templates=("a {}.",)), Mixed(shares=(0.5, 0.5))))
    mixed = told(ConcatSource([captioned, labelled]), feed)
    tokenizer = make_tokenizer(feed.text, mixed.captions())
    batches, seen = iter(Loader(mixed, feed, tokenizer, batch_size=10, needs=("image", "text"))), set()
    for _ in range(12):                                              # over several epochs
        rows = next(batches)["index"].tolist()
        assert sum(r >= 60 for r in rows) == 5, "half labels, half alt-texts"
        seen |= set(rows)
    assert {r for r in seen if r >= 60} == set(range(60, 67)) and len(seen) >= 40
    whole = [len(b["index"]) for b in Loader(mixed, feed, tokenizer, batch_size=10, train=False, needs=("image", "text"))]
    assert sum(whole) == 67, "outside training each sample once"
    with pytest.raises(UserError, match="2 parts"):
        told(ConcatSource([captioned, labelled]), feed.but(told=(Triplets(), Mixed(shares=(1.0,)))))
