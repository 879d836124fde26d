"""Views: the resampling against Pillow, the crops against their definition, the colours against torchvision, and independence of the batch."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import reference

from polysense.base.plan import ViewPlan
from polysense.data.views import TRIES, Draw, blur, canvas_side, colours, crops, cut, draw, flips, lay, view, working_side, working_size

BUSY = ViewPlan(size=16, scale=(0.2, 1.0), flip=0.5, jitter=0.8, grey=0.3, blur=0.5, solarize=0.3)


def pictures(n: int, seed: int = 0, most: int = 60, low: int = 0, high: int = 256) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, (rng.integers(10, most), rng.integers(10, most), 3), dtype=np.uint8) for _ in range(n)]


@pytest.mark.parametrize("size", [8, 16, 50])
def test_cutting_equals_pillows_antialiased_bicubic(size: int):
    held = pictures(4, low=90, high=160)                                   # in the middle: Pillow cuts overshoot off between its two passes
    canvas, sizes = lay(held, 64)
    whole = torch.cat([torch.zeros(4, 2), sizes], 1).double()
    out = cut(canvas, whole, sizes, size, torch.tensor([False, True, False, True]))
    for k, p in enumerate(held):
        want = np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC), dtype=float) / 255
        want = want[:, ::-1] if k % 2 else want
        assert np.abs(out[k].clamp(0, 1).permute(1, 2, 0).numpy() - want).max() < 1.6 / 255                     # Pillow rounds to whole levels, twice
    box = (3.25, 2.5, 9.5, 8.75)
    part = cut(canvas[:1], torch.tensor([box]), sizes[:1], size, torch.tensor([False]))
    want = np.asarray(Image.fromarray(held[0]).resize((size, size), Image.Resampling.BICUBIC, box=box), dtype=float) / 255
    assert np.abs(part[0].permute(1, 2, 0).numpy() - want).max() < 1.6 / 255


def test_crops_fit_and_follow_the_plan():
    plan = ViewPlan(size=16, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    sizes = torch.tensor([[40, 30], [30, 40], [64, 64], [200, 20]]).repeat(500, 1)
    u = draw(0, 0, 0, 2000).u
    x0, y0, x1, y1 = crops(plan, u[:, :2 * TRIES + 2], sizes).unbind(1)
    w, h = sizes.double().unbind(1)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= w + 1e-9).all() and (y1 <= h + 1e-9).all()
    share, ratio = (x1 - x0) * (y1 - y0) / (w * h), (x1 - x0) / (y1 - y0)
    square = torch.arange(2000) % 4 == 2
    assert share[square].min() > 0.199 and share[square].max() < 0.601 and abs(float(share[square].mean()) - 0.4) < 0.02
    assert ratio.min() > 0.499 and ratio.max() < 2.001 and abs(float(ratio[square].log().mean())) < 0.05
    assert float(x0[square].std()) > 3 and float(y0[square].std()) > 3
    wide = torch.arange(2000) % 4 == 3                                     # 10:1: mostly nothing fits, so the widest allowed central crop
    central = wide & ((x1 - x0 - 40).abs() < 1e-6)
    assert central.sum() > 250 and ((x0 + x1)[central] == 200).all() and ((y1 - y0)[central] == 20).all()


def test_default_plan_changes_nothing_but_the_crop():
    canvas, sizes = lay(pictures(3), 64)
    plan, d = ViewPlan(size=16), draw(1, 2, 3, 3)
    image, boxes, mirror = view(plan, d, canvas, sizes)
    assert not mirror.any() and torch.equal(image, cut(canvas, boxes, sizes, 16, mirror).clamp(0, 1)) and image.shape == (3, 3, 16, 16)
    assert torch.equal(flips(plan.but(flip=1.0), d.u), torch.ones(3, dtype=torch.bool))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6]))
def test_a_view_does_not_depend_on_who_else_is_in_the_batch(seed: int, step: int, ranks: int):
    held = pictures(12, seed % 1000)
    canvas, sizes = lay(held, 64)
    d = draw(seed, step, 1, 12)
    whole = view(BUSY, d, canvas, sizes)[0]
    n = 12 // ranks
    parts = [view(BUSY, d.part(k, k + n), *lay(held[k:k + n], 64))[0] for k in range(0, 12, n)]
    assert torch.equal(torch.cat(parts), whole) and whole.min() >= 0 and whole.max() <= 1


def test_draws_differ_by_seed_step_and_view_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = draw(0, 0, 0, 8).u
    canvas, sizes = lay(pictures(8), 64)
    one = view(BUSY, draw(0, 0, 0, 8), canvas, sizes)[0]
    torch.manual_seed(4)
    assert torch.equal(one, view(BUSY, draw(0, 0, 0, 8), canvas, sizes)[0])
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(a, draw(0, 0, 0, 8).u)
    assert all((a - draw(*other, 8).u).abs().max() > 0.1 for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def _only(u_at: dict[int, float], n: int = 2) -> Draw:
    u = torch.full((n, 2 * TRIES + 14), 0.5)
    for column, value in u_at.items():
        u[:, 2 * TRIES + 3 + column] = value
    return Draw(u, (0, 1, 2, 3))


@pytest.mark.parametrize(("k", "name", "amount"), [(0, "brightness", 0.4), (1, "contrast", 0.4), (2, "saturation", 0.4), (3, "hue", 0.1)])
@pytest.mark.parametrize("u", [0.0, 0.31, 0.9])
def test_jitter_equals_torchvision(k: int, name: str, amount: float, u: float):
    reference("timm")                                                      # makes torchvision importable
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    by = [0.0] * 4
    by[k] = amount
    ours = colours(ViewPlan(size=12, jitter=1.0, jitter_by=tuple(by)), _only({0: 0.1, 1 + k: u}), image)
    factor = (2 * u - 1) * amount if name == "hue" else 1 + (2 * u - 1) * amount
    theirs = getattr(functional, f"adjust_{name}")(image, factor)
    assert (ours - theirs).abs().max() < (2e-3 if name != "hue" else 1e-2)    # their grey weights have one digit less


def test_grey_blur_and_solarize():
    image = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    grey = colours(ViewPlan(size=20, grey=1.0), _only({}), image)
    want = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert torch.allclose(grey[:, 0], want, atol=1e-5) and torch.equal(grey[:, 0], grey[:, 2])
    solar = colours(ViewPlan(size=20, solarize=1.0), _only({}), image)
    assert torch.allclose(solar, torch.where(image >= 0.5, 1 - image, image))
    assert torch.equal(colours(ViewPlan(size=20, grey=0.4), _only({}), image), image)                           # 0.5 was drawn: not chosen
    spot = torch.zeros(1, 1, 21, 21)
    spot[0, 0, 10, 10] = 1
    spread = blur(spot, torch.tensor([1.5]))[0, 0]
    want = math.exp(-0.5 * (2 / 1.5) ** 2)
    assert abs(float(spread.sum()) - 1) < 1e-4 and abs(float(spread[10, 12] / spread[10, 10]) - want) < 1e-4 and torch.allclose(spread, spread.T)
    assert torch.allclose(blur(torch.ones(1, 3, 9, 9), torch.tensor([2.0])), torch.ones(1, 3, 9, 9), atol=1e-5)


def test_working_size_fits_the_canvas_and_never_enlarges():
    work = working_side([ViewPlan(size=64), BUSY])
    assert work >= 64 * 1.3 and working_side([BUSY]) >= 16 * 1.5
    for size in ((1000, 700), (700, 1000), (3000, 500), (20, 30), (1, 5000), (work, work)):
        w, h = working_size(size, work)
        assert max(w, h) <= canvas_side(work) and min(w, h) >= 1 and w <= size[0] and h <= size[1]
        assert abs(w / h - size[0] / size[1]) / (size[0] / size[1]) < 0.03 or min(w, h) < 40
    assert min(working_size((1000, 700), work)) == work
