"""Maps out of photographs: outlines are kornia's, lines are straight and where they should be."""
import pytest
import torch
from kornia.filters import canny as outlined

from polysense.base.errors import UserError
from polysense.data.hints import EXTRACTORS, extracted


@pytest.fixture()
def image():
    """A bright box with an upright side at column 10, and a small disc beside it."""
    x = torch.zeros(1, 3, 64, 64)
    x[..., 8:40, 10:30] = 1.0
    row, column = torch.arange(64)[:, None], torch.arange(64)
    x[:, :, (row - 50) ** 2 + (column - 50) ** 2 <= 36] = 1.0
    return x


def test_outlines_are_thin_and_of_every_thing(image):
    got = extracted("canny", image)
    assert got.shape == image.shape and torch.equal(got[:, :1], outlined(image, 0.1, 0.2)[1])
    assert set(got.unique().tolist()) == {0.0, 1.0} and not got[..., 14:34, 16:24].any(), "nothing inside the box"
    assert got[..., 15:35, 8:12].any(-1).all() and got[..., 42:58, 42:58].any() and got.mean() < 0.1


def test_lines_are_the_straight_outlines_alone(image):
    got, edge = extracted("lines", image), extracted("canny", image)
    assert (got <= edge).all(), "drawn where the outline is"
    assert got[..., 15:35, 8:12].any(-1).all() and got[..., 6:10, 14:26].any(-2).all(), "two sides of the box"
    assert got[..., 43:58, 43:58].sum() < 0.5 * edge[..., 43:58, 43:58].sum(), "the disc has hardly any"
    assert not extracted("lines", torch.zeros(2, 3, 16, 16)).any(), "an empty picture has none"


def test_strokes_are_where_it_is_darker_than_around():
    side = 96
    paper = torch.full((1, 3, side, side), 0.9)
    paper[..., 30:33, 10:80] = 0.1                                       # a pen's stroke
    paper[..., 60:, :] = 0.4                                             # a step: strokes on its dark side only
    red = paper.clone()
    red[:, 0] = 0.9                                                      # not darker in every channel
    got = extracted("scribble", paper)
    assert got.shape == paper.shape and set(got.unique().tolist()) == {0.0, 1.0}
    assert got[..., 30:33, 12:78].all() and not got[..., 40:58, :].any() and not got[..., 5:25, :].any() and not got[..., 75:, :].any()
    assert got[..., 60, 20:70].all() and not got[..., 57, :].any() and not extracted("scribble", red).any()


def test_another_map_is_refused(image):
    with pytest.raises(UserError, match="canny, lines, scribble"):
        extracted("depth", image)
    assert set(EXTRACTORS) == {"canny", "lines", "scribble"}
