"""Distances between drawn and real pictures, on cases whose answer is known."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from polysense.base.errors import UserError
from polysense.base.plan import Feed, ImagePlan
from polysense.data import source
from polysense.tasks import exams_for, take
from polysense.tasks.generation import fid, kid, teach

PLAN = ImagePlan(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)


def drawer(make):
    system = SimpleNamespace(sample_image=make)
    return SimpleNamespace(system=system, preset=SimpleNamespace(feed=Feed(image=PLAN)), id="drawer", device=torch.device("cpu"))


def test_fid_is_the_textbook_formula_and_kid_the_slow_sum():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5)) + 1
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert fid(a, b) == pytest.approx(want, rel=1e-6) and fid(a, a) == pytest.approx(0, abs=1e-8) and fid(a, b) == pytest.approx(fid(b, a))
    k = lambda x, y: (x @ y / 5 + 1) ** 3
    n, m = len(a), len(b)
    slow = (sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
            + sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1)) - 2 * sum(k(x, y) for x in a for y in b) / (n * m))
    assert kid(a, b) == pytest.approx(slow)


def test_real_pictures_are_nearer_than_noise():
    train, test = source("scenes:single?style=plain&size=16&shapes=3&n=200"), source("scenes:single?style=plain&size=16&shapes=3&n=60", split="test")
    from polysense.data.images import read_images
    pictures = read_images(PLAN, [train[i]["image"] for i in range(60)])
    real = take("generation", drawer(lambda count, steps: pictures[:count]), test, train=train, count=60, judge_steps=20)
    noise = take("generation", drawer(lambda count, steps: torch.randn(count, 3, 8, 8)), test, train=train, count=60, judge_steps=20)
    assert real.value < noise.value / 2 and real.metrics["kid"].value < noise.metrics["kid"].value
    assert real.metrics["fid"].low <= real.metrics["fid"].high and 0 <= real.metrics["confident"].value <= 1 and real.n == 60
    assert "generation" in exams_for(drawer(lambda count, *, steps: pictures).system)


def test_the_judge_is_always_the_same():
    train = source("scenes:single?style=plain&size=16&shapes=2&n=50")
    one = teach(train, PLAN, steps=2)
    torch.randn(3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), teach(train, PLAN, steps=2).state_dict().values(), strict=True))


def test_too_few_pictures_are_refused():
    train = source("scenes:single?style=plain&size=16&shapes=2&n=20")
    with pytest.raises(UserError, match="at least two"):
        take("generation", drawer(lambda count, steps: torch.zeros(count, 3, 8, 8)), source("scenes:single?size=16&shapes=2&n=9", split="test"),
             train=train, count=1, judge_steps=1)
