"""Pictures, texts and pairs of both in one batch, each as what it is; which word a token is a piece of."""
import numpy as np
import pytest
import torch

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan, TextPlan
from polysense.base.telling import Mixed, Roles, ToldFeed
from polysense.data.loader import Loader
from polysense.data.sources import ConcatSource, ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.data.told import told

RED = np.full((16, 16, 3), (250, 10, 10), np.uint8)
FEED = ToldFeed(image=ImagePlan(size=16), text=TextPlan(kind="wordpiece", vocab=120, length=30), told=(Roles(), Mixed(shares=(0.25, 0.5, 0.25))))


def joined():
    pairs = ListSource("pairs", [{"id": f"p{i}", "image": RED, "captions": [f"pair number {i}"]} for i in range(8)], ("image", "text"))
    pictures = ListSource("pictures", [{"id": f"i{i}", "image": RED, "label": 0} for i in range(30)], ("image", "label"), classes=("red",))
    texts = ListSource("texts", [{"id": f"t{i}", "captions": ["only words here"]} for i in range(5)], ("text",))
    return ConcatSource([pairs, pictures, texts])


def test_a_batch_holds_pictures_texts_and_pairs_by_their_shares():
    source = told(joined(), FEED)
    assert {"image", "text", "has"} <= set(source.offers)
    tokenizer = make_tokenizer(FEED.text, source.captions())
    batches = iter(Loader(source, FEED, tokenizer, batch_size=8, needs=("image", "text", "word", "has|image"), seed=3))
    for batch in (next(batches) for _ in range(5)):
        has = batch["has"]
        assert torch.bincount(has).tolist() == [2, 4, 2]
        said = [tokenizer.decode(t) for t in batch["text"]]
        assert all((s == "only words here") == (h == 2) and s.startswith("pair number") == (h == 0) for s, h in zip(said, has.tolist(), strict=True))
        flat = batch["image"].flatten(1).amax(1) - batch["image"].flatten(1).amin(1)
        assert bool((flat[has != 2] > 3).all()) and bool((flat[has == 2] < 1).all()), "red, or the filler's grey"


def test_one_source_has_no_roles():
    with pytest.raises(UserError, match="join pictures, texts and pairs"):
        told(joined().sources[0], FEED)


def test_pieces_of_words_have_the_number_of_their_word():
    texts = ["red circle", "unredcircling red"]
    for kind, plan in (("wordpiece", FEED.text), ("bpe", TextPlan(vocab=120, length=30))):
        tokenizer = make_tokenizer(plan, texts[:1] * 3 + ["un ing l c"])
        ids = tokenizer(texts)
        word = tokenizer.words(ids)
        assert word.shape == ids.shape and word[0, 0] == -1 and int(word[0].max()) == 1
        whole = word[1][word[1] >= 0].tolist()
        assert whole == sorted(whole) and whole.count(0) > 1 and set(whole) == {0, 1}, (kind, whole)
        assert tokenizer.decode(ids[1][word[1] == 1]) == "red"
        assert bool((word[torch.isin(ids, torch.tensor([tokenizer.start, tokenizer.end, tokenizer.pad]))] == -1).all())
