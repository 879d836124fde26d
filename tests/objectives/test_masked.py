"""Losses on hidden patches against slow twins."""
import pytest
import torch

from polysense.base.errors import UserError
from polysense.objectives.masked import masked_mse


def test_masked_mse_is_the_mean_over_hidden_patches_of_their_mean():
    prediction, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    slow = sum(((prediction[b, m] - target[b, m]) ** 2).mean() for b in range(2) for m in range(3)) / 6
    torch.testing.assert_close(masked_mse(prediction, target), slow)
    assert masked_mse(target, target) == 0
    with pytest.raises(UserError, match="same hidden patches"):
        masked_mse(prediction, target[:, :2])
