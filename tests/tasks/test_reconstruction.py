"""The exam of what is drawn again: known errors, masks drawn by the seed, codes counted, torn pictures left out."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan
from polysense.data.sources import BadSample
from polysense.tasks import exams_for, take

PLAN = ImagePlan(size=16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (PLAN.mean, PLAN.std))


class Greys:
    """Sample i is one grey, i / 10."""
    name, offers, classes = "greys", ("image",), ()

    def __init__(self, n=5, bad=()):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise BadSample(f"s{i}", "torn")
        return {"image": np.full((3, 16, 16), i / 10, np.float32)}


class Off(nn.Module):
    """Draws every picture a tenth too bright; its code is the grey in tenths."""
    codec = SimpleNamespace(codes=16)

    def reconstruct(self, image):
        return (image * STD + MEAN + 0.1 - MEAN) / STD

    def encode_codes(self, image):
        return ((image * STD + MEAN)[:, 0, :2, :2] * 10).round().long()


class Masked(nn.Module):
    """Half of the pixels, drawn anew every time, come out black."""

    def reconstruct(self, image):
        return torch.where(torch.rand(image.shape) < 0.5, -MEAN / STD, image)


def subject(system):
    read = lambda images: (torch.stack([torch.from_numpy(x) for x in images]) - MEAN) / STD
    return SimpleNamespace(system=system, id="toy", read_images=read, preset=SimpleNamespace(feed=SimpleNamespace(image=PLAN)))


def test_a_known_error_has_its_decibels_and_codes_are_counted():
    found = take("reconstruction", subject(Off()), Greys(5))
    assert found.metrics["psnr"].value == pytest.approx(20, abs=1e-3) and found.n == 5 and 0 < found.metrics["ssim"].value <= 1
    assert found.notes == {"codes in use": 5, "codes": 16, "perplexity of the codes": 5.0}
    np.testing.assert_allclose(found.units.total, np.full((1, 5), 20), atol=1e-3)
    assert take("reconstruction", subject(Off()), Greys(1)).notes["perplexity of the codes"] == 1.0


def test_what_a_mask_hides_is_drawn_by_the_seed_and_the_random_stream_stays():
    stream = torch.get_rng_state()
    one, two, other = (take("reconstruction", subject(Masked()), Greys(6), seed=s).value for s in (0, 0, 1))
    assert one == two != other and torch.equal(torch.get_rng_state(), stream)
    assert "codes in use" not in take("reconstruction", subject(Masked()), Greys(3)).notes


def test_a_distance_is_taken_between_pictures_from_minus_one_to_one():
    seen = []

    def far(one, two):
        seen.append((one, two))
        return (one - two).square().mean((1, 2, 3))
    found = take("reconstruction", subject(Off()), Greys(3), distance=far)
    assert found.metrics["lpips"].value == pytest.approx(0.04, abs=1e-5) and seen[0][1].min() == -1 and seen[0][0].shape == (1, 3, 16, 16)


def test_torn_pictures_are_listed_and_progress_is_told():
    said = []
    found = take("reconstruction", subject(Off()), Greys(5, bad=(2,)), batch_size=2, progress=lambda *x: said.append(x))
    assert found.n == 4 and found.notes["skipped"] == [["s2", "torn"]] and said == [(2, 5), (4, 5), (5, 5)]
    with pytest.raises(UserError, match=r"no picture of 'greys' can be read.*torn"):
        take("reconstruction", subject(Off()), Greys(2, bad=(0, 1)))


def test_numbers_that_are_not_finite_are_refused_and_who_draws_nothing_cannot_sit_it():
    class Broken(Off):
        def reconstruct(self, image):
            return image * float("nan")

    with pytest.raises(UserError, match="not finite"):
        take("reconstruction", subject(Broken()), Greys())
    assert exams_for(Off()) == ("reconstruction",)
    with pytest.raises(UserError, match="asks for reconstruct"):
        take("reconstruction", subject(nn.Identity()), Greys())
