"""Keys without gradient: the batch's own against a slow twin (the queue's stand in tests/systems/test_moco.py)."""
import pytest
import torch
import torch.nn.functional as F

from polysense.objectives.twin import batch_nce


def test_batch_nce_is_cross_entropy_over_the_keys_times_two_temperatures():
    q, k = (F.normalize(torch.randn(4, 5), dim=-1).requires_grad_() for _ in range(2))
    loss = batch_nce(q, k, 0.3)
    logits = (q @ k.T / 0.3).detach()
    slow = 2 * 0.3 * sum(float(logits[i].logsumexp(0) - logits[i, i]) for i in range(4)) / 4
    assert float(loss.detach()) == pytest.approx(slow, rel=1e-5)
    loss.backward()
    assert q.grad is not None and k.grad is None
