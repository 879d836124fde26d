"""Small views beside the large ones."""
import pytest
import torch

from polysense.base.batch import check_batch
from polysense.base.errors import UserError
from polysense.base.plan import CropFeed, Feed, ImagePlan, ViewPlan
from polysense.data import source
from polysense.data.loader import Loader

BIG, SMALL = ViewPlan(size=32, scale=(0.4, 1.0)), ViewPlan(size=16, scale=(0.05, 0.4), flip=0.5)
FEED = CropFeed(image=ImagePlan(size=32), views=(BIG, BIG), crops=(SMALL, SMALL, SMALL))
NEEDS = ("views", "crops")


def first(feed, **options):
    return next(iter(Loader(source("scenes:single?n=12"), feed, None, batch_size=4, needs=NEEDS, seed=3, **options)))


def test_crops_are_independent_views_of_their_own_size_and_leave_the_others_alone():
    batch = first(FEED)
    check_batch(batch, NEEDS)
    assert batch["views"].shape == (4, 2, 3, 32, 32) and batch["crops"].shape == (4, 3, 3, 16, 16)
    assert all((batch["crops"][:, i] - batch["crops"][:, j]).abs().amax((1, 2, 3)).min() > 0.05 for i, j in ((0, 1), (1, 2)))
    plain = next(iter(Loader(source("scenes:single?n=12"), Feed(image=FEED.image, views=FEED.views), None, batch_size=4, needs=("views",), seed=3)))
    assert torch.equal(plain["views"], batch["views"]) and torch.equal(first(FEED)["crops"], batch["crops"])
    halves = [first(FEED, rank=r, world=2)["crops"] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), batch["crops"])


def test_a_feed_without_crops_is_refused():
    with pytest.raises(UserError, match="does not say how to read crops"):
        first(Feed(image=FEED.image, views=FEED.views))
