"""Sinkhorn, KoLeo and the masked cross-entropy against slow twins and at their ends."""
from math import log

import pytest
import torch
import torch.nn.functional as F

from polysense.objectives.clusters import sinkhorn
from polysense.objectives.codes import perplexity
from polysense.objectives.twin import koleo, masked_ce


def test_sinkhorn_rows_sum_to_one_prototypes_are_used_evenly_and_a_constant_on_one_hardly_shows():
    logits = torch.randn(24, 8)
    few, many = sinkhorn(logits, 0.1), sinkhorn(logits, 0.1, 60)
    torch.testing.assert_close(few.sum(1), torch.ones(24))
    torch.testing.assert_close(many.sum(0), torch.full((8,), 24 / 8), rtol=1e-2, atol=1e-2)
    moved = logits + F.one_hot(torch.tensor(3), 8) * 0.3
    assert float((sinkhorn(moved, 0.1, 60) - many).abs().max()) < 1e-2 < float((sinkhorn(logits, 0.1, 60) - (logits / 0.1).softmax(1)).abs().max())
    assert float(perplexity(many.mean(0))) == pytest.approx(8, rel=1e-3)


def test_sinkhorn_is_the_released_recursion():
    logits, q = torch.randn(6, 5), None
    q = (logits / 0.2).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= 5
        q /= q.sum(0, keepdim=True)
        q /= 6
    torch.testing.assert_close(sinkhorn(logits, 0.2), (q * 6).T, rtol=1e-4, atol=1e-6)
    assert sinkhorn(torch.zeros(0, 5), 0.2).shape == (0, 5)


def test_koleo_knows_no_length_falls_as_the_nearest_pair_parts_and_never_pairs_a_row_with_itself():
    x = torch.randn(7, 4)
    u = F.normalize(x, dim=-1)
    slow = -sum(log(min(float((u[i] - u[j]).norm()) for j in range(7) if j != i)) for i in range(7)) / 7
    assert float(koleo(x)) == pytest.approx(slow, rel=1e-3) and float(koleo(x * 9)) == pytest.approx(slow, rel=1e-3)
    near = torch.tensor([[1.0, 0.0], [0.99, 0.1], [-1.0, 0.0]])
    apart = near.clone()
    apart[1] = torch.tensor([0.0, 1.0])
    assert koleo(apart) < koleo(near)
    twins = torch.ones(3, 4).requires_grad_()
    koleo(twins).backward()
    assert bool(twins.grad.isfinite().all()) and float(koleo(torch.ones(1, 4))) == 0


def test_masked_cross_entropy_is_a_mean_over_patches_then_over_pictures():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    student, target = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6).softmax(-1).requires_grad_()
    term = [-(target[i] * (student[i] / 0.1).log_softmax(-1)).sum() for i in range(3)]
    loss = masked_ce(student, target, mask, 0.1)
    torch.testing.assert_close(loss, ((term[0] + term[1]) / 2 + 0 + term[2]) / 3)
    loss.backward()
    assert target.grad is None
    assert float(masked_ce(student[:0], target[:0], torch.zeros(3, 3, dtype=torch.bool), 0.1)) == 0
