"""Numbers of health against slow twins and at their ends."""
from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from polysense.objectives import health


def test_spread_is_one_on_an_even_sphere_and_zero_for_one_point():
    g = torch.Generator().manual_seed(0)
    even, point = torch.randn(512, 64, generator=g), torch.randn(1, 64, generator=g).expand(32, -1)
    assert float(health.feature_spread(even)) == pytest.approx(1, abs=0.02) and float(health.feature_spread(point)) < 1e-3
    assert float(health.feature_spread(even * 7)) == pytest.approx(float(health.feature_spread(even)), rel=1e-5)
    x = torch.randn(5, 3, generator=g)
    unit = [[v / sum(w * w for w in row) ** 0.5 for v in row] for row in x.tolist()]
    stds = [(sum((r[k] - sum(s[k] for s in unit) / 5) ** 2 for r in unit) / 5) ** 0.5 for k in range(3)]
    assert float(health.feature_spread(x)) == pytest.approx(sum(stds) / 3 * 3 ** 0.5, rel=1e-5)


def test_effective_rank_counts_dimensions_whichever_side_is_longer():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=g)).Q
    for samples in (20, 400):
        plane = torch.randn(samples, 3, generator=g) @ basis[:3]
        assert 2 < float(health.effective_rank(plane)) <= 3.001
        value = torch.linalg.svdvals(F.normalize(plane, dim=-1) - F.normalize(plane, dim=-1).mean(0))
        share = value / value.sum()
        assert float(health.effective_rank(plane)) == pytest.approx(exp(-float((share * (share + 1e-12).log()).sum())), rel=1e-2)
    assert float(health.effective_rank(basis[:1].expand(9, -1))) == 0


def test_alignment_and_uniformity_against_slow_twins():
    one, two = torch.randn(6, 4), torch.randn(6, 4)
    u, v = F.normalize(one, dim=-1), F.normalize(two, dim=-1)
    assert float(health.alignment(one, two)) == pytest.approx(sum(float((u[i] - v[i]).square().sum()) for i in range(6)) / 6, rel=1e-5)
    assert float(health.alignment(one, one * 3)) == pytest.approx(0, abs=1e-6)
    slow = [exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(6) for j in range(6) if i != j]
    assert float(health.uniformity(one)) == pytest.approx(log(sum(slow) / len(slow)), rel=1e-4)
    assert float(health.uniformity(one[:1].expand(5, -1))) == pytest.approx(0, abs=1e-5)


def test_answers_tell_the_two_collapses_from_health():
    same, uniform, sure = F.one_hot(torch.zeros(8, dtype=torch.long), 8).float(), torch.full((8, 8), 1 / 8), torch.eye(8)
    told = {name: {k: float(v) for k, v in health.of_answers(a).items()} for name, a in (("same", same), ("uniform", uniform), ("sure", sure))}
    assert told["same"] == pytest.approx({"teacher_entropy": 0, "teacher_certainty": log(8), "answers_used": 1})
    assert told["uniform"] == pytest.approx({"teacher_entropy": log(8), "teacher_certainty": 0, "answers_used": 8}, abs=1e-5)
    assert told["sure"] == pytest.approx({"teacher_entropy": 0, "teacher_certainty": log(8), "answers_used": 8})


def test_codes_in_use():
    said = health.of_codes(torch.tensor([[0, 0], [3, 3]]), 8)
    assert float(said["codes_used"]) == pytest.approx(2) and float(said["share_of_codes"]) == pytest.approx(0.25)
