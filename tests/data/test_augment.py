"""RandAugment and erasing: each operation does what its name says, each picture draws for itself."""
import pytest
import torch

from polysense.base.errors import UserError
from polysense.base.plan import AugmentOnlyPlan, AugmentPlan
from polysense.data import views
from polysense.data.augment import OPERATIONS, augmented


def one(name: str, x: torch.Tensor, v: float, sign: float = 1.0) -> torch.Tensor:
    return OPERATIONS[name](x, torch.full((len(x),), v), torch.full((len(x),), sign))


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.rand(3, 3, 16, 16) * 0.6 + 0.2


def test_there_are_fifteen_and_all_keep_the_shape(image):
    assert len(OPERATIONS) == 15
    for name in OPERATIONS:
        y = one(name, image, 0.9)
        assert y.shape == image.shape and bool(y.isfinite().all()) and not torch.allclose(y, image, atol=1e-3), name


@pytest.mark.parametrize("name", ["rotate", "color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_those_with_a_direction_do_nothing_at_strength_zero(image, name):
    torch.testing.assert_close(one(name, image, 0.0), image, rtol=1e-4, atol=1e-4)


def test_values(image):
    torch.testing.assert_close(one("invert", image, 0.5), 1 - image)
    stretched = one("autocontrast", image, 0.5)
    torch.testing.assert_close(stretched.amax((2, 3)), torch.ones(3, 3))
    torch.testing.assert_close(stretched.amin((2, 3)), torch.zeros(3, 3))
    torch.testing.assert_close(one("brightness", image, 0.5, -1.0), image * 0.55)
    bright = image >= 0.4
    torch.testing.assert_close(one("solarize", image, 0.6), torch.where(bright, 1 - image, image))
    assert len(one("posterize", image, 1.0).unique()) == 1 and len(one("posterize", image, 0.5).unique()) <= 4
    assert torch.equal(one("posterize", torch.tensor([255, 128, 7]).view(1, 1, 1, 3).expand(1, 3, 1, 3) / 255, 0.0),
                       torch.tensor([240, 128, 0]).view(1, 1, 1, 3).expand(1, 3, 1, 3) / 255)
    shifted = one("translate_x", image, 1.0)                             # 0.45 of the side is 7.2 pixels
    torch.testing.assert_close(shifted[..., 2], 0.8 * image[..., 9] + 0.2 * image[..., 10], rtol=1e-3, atol=1e-3)


def test_a_picture_does_not_depend_on_its_batch_and_half_the_draws_change_nothing():
    torch.manual_seed(0)
    image, plan = torch.rand(64, 3, 16, 16), AugmentPlan(size=16, operations=2, erase=0.0)
    drawn = views.draw(3, 5, 0, 64)
    together = views.colours(plan, drawn, image)
    apart = torch.cat([views.colours(plan, drawn.part(i, i + 8), image[i:i + 8]) for i in range(0, 64, 8)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    same = (together == image).flatten(1).all(1).float().mean()
    assert 0.1 < float(same) < 0.45, "a quarter keeps both operations off"
    assert torch.equal(views.colours(AugmentPlan(size=16, operations=0, erase=0.0), drawn, image), image)


def test_a_quarter_is_erased_within_the_published_share_of_the_area():
    image, plan = torch.full((400, 3, 32, 32), 0.123), AugmentPlan(size=32, operations=0)
    out = augmented(plan, torch.rand(400, 2, generator=torch.Generator().manual_seed(0)), image)
    gone = (out != image).any(1).flatten(1).float().mean(1)
    assert float((gone > 0).float().mean()) == pytest.approx(0.25, abs=0.06)
    some = gone[gone > 0]
    assert float(some.min()) > 0.01 and float(some.max()) < 0.36 and bool((image == 0.123).all()), "what came in is left alone"


def test_operations_can_be_left_out():
    drawn = views.draw(3, 5, 0, 16)
    u, image = drawn.u[:, 2 * views.TRIES + 3 + 9:2 * views.TRIES + 3 + 11], torch.rand(16, 3, 8, 8)
    inverted = augmented(AugmentOnlyPlan(size=8, operations=1, erase=0.0, only=("invert",)), u, image)
    changed = (inverted != image).flatten(1).any(1)
    assert 0 < int(changed.sum()) < 16
    torch.testing.assert_close(inverted, torch.where(changed.view(-1, 1, 1, 1), 1 - image, image))
    for wrong in ((), ("invert", "blue")):
        with pytest.raises(UserError, match="RandAugment"):
            augmented(AugmentOnlyPlan(size=8, only=wrong), u, image)
