"""One source beside another: which sample meets which, what each adds, and what is refused."""
import numpy as np
import pytest

from polysense.base.errors import UserError
from polysense.base.plan import Feed, ImagePlan, VideoPlan, ViewPlan
from polysense.data import source
from polysense.data.beside import BesideSource
from polysense.data.loader import Loader
from polysense.data.sources import BadSample, ListSource


def clips(n=3):
    return ListSource("clips", [{"id": f"c{i}", "video": np.full((4, 8, 8, 3), 10 * i, np.uint8), "captions": [f"clip {i}"], "label": i % 2}
                                for i in range(n)], ("video", "text", "label"), classes=("off", "on"), largest=8)


def photos(n=5, bad=()):
    class Photos(ListSource):
        def _load(self, i, key):
            if i in bad:
                raise BadSample(self.id(i), "torn")
            return super()._load(i, key)
    return Photos("photos", [{"id": f"p{i}", "image": np.full((6, 6, 3), i, np.uint8), "captions": [f"photo {i}"], "label": 7} for i in range(n)],
                  ("image", "text", "label"), largest=6)


def test_the_longer_is_passed_once_and_the_shorter_begins_again():
    both = BesideSource(clips(), photos())
    assert len(both) == 5 and set(both.offers) == {"index", "video", "text", "label", "video_mask", "text_mask", "image", "views"}
    met = [(s["id"], int(s["video"][0, 0, 0, 0]) // 10, int(np.asarray(s["image"])[0, 0, 0])) for s in both]
    assert met == [("c0 beside p0", 0, 0), ("c1 beside p1", 1, 1), ("c2 beside p2", 2, 2), ("c0 beside p3", 0, 3), ("c1 beside p4", 1, 4)]
    assert len(BesideSource(clips(9), photos())) == 9


def test_words_and_labels_are_those_of_the_first():
    both = BesideSource(clips(), photos())
    assert both[4]["captions"] == ["clip 1"] and both[4]["label"] == 1 and both.classes == ("off", "on") and both.largest == 8
    assert list(both.captions()) == ["clip 0", "clip 1", "clip 2", "clip 0", "clip 1"]


def test_batches_hold_both_and_a_torn_one_leaves_its_pair_out():
    feed = Feed(image=ImagePlan(size=4), train_image=ViewPlan(size=4, scale=(1.0, 1.0)), video=VideoPlan(frames=2))
    fed = Loader(BesideSource(clips(), photos(bad=(3,))), feed, None, batch_size=4, train=False, needs=("image", "video"), workers=0)
    batch = next(iter(fed))
    assert batch["image"].shape == (3, 3, 4, 4) and batch["video"].shape == (3, 2, 3, 4, 4) and [i for i, _ in fed.skipped] == ["p3"]


def test_it_is_said_in_the_name_of_the_data_and_other_options_stay(monkeypatch):
    opened = []

    def named(name, split, root, options):
        opened.append((name, split, options))
        return clips() if name == "surveillance_action" else photos()
    monkeypatch.setattr("polysense.data.named.named_source", named)
    both = source("surveillance_action?size=9&beside=cifar10&note=a%20b", "val")
    assert isinstance(both, BesideSource) and both[4]["id"] == "c1 beside p4"
    assert opened == [("surveillance_action", "val", {"size": "9", "note": "a b"}), ("cifar10", "val", {})]
    monkeypatch.setattr("polysense.data.scenes.scenes_source", lambda text, split: opened.append(text) or clips())
    source("scenes:clips?shapes=circle,star&beside=cifar10")
    assert opened[2] == "scenes:clips?shapes=circle,star"
    joined = source("surveillance_action?beside=cifar10+surveillance_action?beside=cifar10")
    assert len(joined) == 10 and {"image", "video"} <= set(joined.offers)


def test_what_adds_nothing_and_what_is_not_there_are_refused():
    with pytest.raises(UserError, match=r"digits has nothing to stand beside.*join them"):       # drawn clips have pictures of their own
        source("scenes:clips?size=16&beside=digits")
    with pytest.raises(UserError, match="nowhere_at_all"):
        source("digits?beside=nowhere_at_all")


def test_nobody_asks_the_other_for_what_is_not_wanted():
    asked = []

    class Watched(ListSource):
        def only(self, keys):
            asked.append(tuple(keys))
            return self
    both = BesideSource(Watched("v", clips().samples, ("video",)), Watched("p", photos().samples, ("image",)))
    assert both.only(("image",)).offers == both.offers and asked == [("image",), ("image",)]
    assert both.only(("image",))[4]["id"] == "c1 beside p4"


def test_empty_sources_are_refused():
    with pytest.raises(UserError, match="photos has no samples"):
        BesideSource(clips(), photos(0))
