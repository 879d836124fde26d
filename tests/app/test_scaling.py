"""Laws of scaling: fitted, tried on what they were not shown, and the numbers they stand on."""
import numpy as np
import pytest
import torch
from fake import fake_batch

from polysense.app.scaling import Point, fit_law, gmacs, pareto, scan_rate, seen
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError


def test_a_known_law_is_recovered_and_bounded():
    exact = [Point(c, 3.0 * c ** -0.25) for c in (1.0, 4.0, 20.0, 100.0, 700.0)]
    law = fit_law(exact)
    assert law.alpha == pytest.approx(-0.25) and law.beta == pytest.approx(3.0) and law.low == pytest.approx(law.high)
    assert law.predict(5000.0) == pytest.approx(3.0 * 5000 ** -0.25) and law.miss(Point(5000.0, 3.0 * 5000 ** -0.25)) == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    noisy = [Point(float(c), float(2.0 * c ** -0.4 * np.exp(rng.normal(0, 0.02)))) for c in np.geomspace(1, 1e4, 24)]
    law = fit_law(noisy)
    assert law.low < -0.4 < law.high and law.high - law.low < 0.05 and fit_law(noisy) == law, "the same points give the same law"


def test_only_the_front_counts():
    front = [Point(1.0, 0.8), Point(10.0, 0.4), Point(100.0, 0.2)]
    wasted = [Point(10.0, 0.9), Point(50.0, 0.45), Point(100.0, 0.3)]
    assert pareto(wasted + front) == front
    assert fit_law([*front, *wasted]).alpha == pytest.approx(fit_law(front).alpha)
    assert fit_law(front).front == tuple(front)


def test_points_without_a_law_are_refused():
    with pytest.raises(UserError, match="above 0"):
        fit_law([Point(1.0, 0.5), Point(2.0, 0.0, "perfect")])
    with pytest.raises(UserError, match="two at least"):
        fit_law([Point(1.0, 0.5), Point(2.0, 0.6)])


def test_products_of_a_pass_are_counted():
    preset = preset_of("clip_scaling", "vit_b_32")
    blocks = 12 * (50 * 12 * 768 ** 2 + 2 * 50 ** 2 * 768) + 12 * (77 * 12 * 512 ** 2 + 2 * 77 ** 2 * 512)
    whole = (blocks + 49 * 3 * 32 ** 2 * 768 + 2 * 768 * 512) / 1e9
    last = (50 * 10 * 768 ** 2 + 77 * 10 * 512 ** 2) / 1e9              # of the last block only the token that is read is computed
    assert gmacs(preset) == pytest.approx(whole - last, rel=0.02)
    assert gmacs(preset_of("clip_scaling", "vit_l_14")) > 5 * gmacs(preset)
    with pytest.raises(UserError, match="neither pictures nor texts"):
        gmacs(preset_of("lora"))


def test_samples_seen_are_the_axis():
    preset = preset_of("clip_scaling")
    got = seen(preset, 12_800)
    assert got.stages[0].steps == 100 and got.stages[0].optim.warmup == 10 and got.stages[0].batch_size == 128


def test_the_rate_of_the_least_loss_is_chosen_and_divergence_is_no_choice():
    preset = preset_of("clip_scaling", "tiny").but(**{"stages.0.batch_size": 4, "stages.0.chunk": None, "stages.0.optim.clip": None})
    batch = fake_batch(preset, ("image", "text"))
    assert scan_rate(preset, lambda: [batch] * 8, (1e-7, 1e-3), steps=8) == 1e-3
    wild = preset.but(**{"stages.0.optim.name": "sgd"})
    assert scan_rate(wild, lambda: [batch] * 8, (1e-4, 1e30), steps=8) == 1e-4
    with pytest.raises(UserError, match="diverges at every rate"):
        scan_rate(wild, lambda: [batch] * 8, (1e30,), steps=8)
    with pytest.raises(UserError, match="0 rates"):
        scan_rate(preset, lambda: [batch], ())


def test_scan_leaves_the_random_state_of_each_rate_alike():
    preset = preset_of("clip_scaling", "tiny").but(**{"stages.0.batch_size": 4, "stages.0.chunk": 2})
    batch = fake_batch(preset, ("image", "text"))
    torch.manual_seed(1)
    assert scan_rate(preset, lambda: [batch] * 4, (3e-4,), steps=4) == 3e-4
