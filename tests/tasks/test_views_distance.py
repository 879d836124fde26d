"""The exam of views with a perceptual distance handed in."""
import pytest
import torch
from torch import nn

from polysense.data import source
from polysense.tasks.views import run


class Grey(nn.Module):
    def render_view(self, origin, direction):
        return torch.full_like(origin, 0.5)


def test_the_distance_is_taken_between_whole_pictures():
    asked, seen = source("solids?views=2&size=8&seed=1", "test"), []

    class Subject:
        system, device, preset, id = Grey(), torch.device("cpu"), None, "grey"

    def far(one, two):
        seen.append((one, two))
        return (one - two).square().mean((1, 2, 3))
    told = run(Subject(), asked, distance=far).metrics
    assert "lpips" not in run(Subject(), asked).metrics and len(seen) == len(asked.cameras.image)
    assert all(a.shape == b.shape == (1, 3, *asked.cameras.image[0].shape[:2]) for a, b in seen) and float(seen[0][0].abs().max()) == 0
    want = sum(((2 * torch.from_numpy(p).float() - 1) ** 2).mean() for p in asked.cameras.image) / len(seen)
    assert told["lpips"].value == pytest.approx(float(want), abs=1e-5)
