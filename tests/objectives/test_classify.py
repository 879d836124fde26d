"""Supervised losses against their formulas, and the algebra of mixup."""
from math import exp, log

import pytest
import torch

from polysense.objectives.classify import mixup, sigmoid_ce, softmax_ce


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_ce_equals_its_slow_twin(smoothing: float):
    logits, label = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for row, y in zip(logits.tolist(), label.tolist(), strict=True):
        norm = log(sum(exp(v) for v in row))
        target = [smoothing / 4 + (1 - smoothing) * (c == y) for c in range(4)]
        total -= sum(t * (v - norm) for t, v in zip(target, row, strict=True))
    assert float(softmax_ce(logits, label, smoothing)) == pytest.approx(total / 5, rel=1e-5)
    hot = torch.nn.functional.one_hot(label, 4).float()
    assert float(softmax_ce(logits, hot, smoothing)) == pytest.approx(total / 5, rel=1e-5)


def test_sigmoid_ce_sums_over_classes():
    logits, tags = torch.randn(3, 4), torch.randint(0, 2, (3, 4)).float()
    pairs = zip(logits.flatten().tolist(), tags.flatten().tolist(), strict=True)
    total = sum(-log(1 / (1 + exp(-v if t else v))) for v, t in pairs)
    assert float(sigmoid_ce(logits, tags)) == pytest.approx(total / 3, rel=1e-5)


def test_mixup_mixes_pictures_and_targets_alike():
    g = torch.Generator().manual_seed(0)
    image = torch.nn.functional.one_hot(torch.arange(9), 9).float()[:, :, None]              # a picture that shows its own label
    mixed, target = mixup(image, torch.arange(9), 9, 0.8, g)
    torch.testing.assert_close(mixed.squeeze(-1), target)
    torch.testing.assert_close(target.sum(1), torch.ones(9))
    assert not torch.equal(target, target.round())
    again, _ = mixup(image, torch.arange(9), 9, 0.8, torch.Generator().manual_seed(0))
    assert torch.equal(mixed, again)
    assert torch.equal(mixup(image, torch.arange(9), 9, 0.0)[0], image)
