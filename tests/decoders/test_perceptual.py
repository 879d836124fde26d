"""The distance a network sees (Zhang et al. 2018, equation 1)."""
import pytest
import torch

from polysense.base.errors import UserError
from polysense.decoders.perceptual import Perceptual, vgg_rows

SMALL = Perceptual.Config(rows=vgg_rows((1, 2), base=4), seen=(0, 2))


@pytest.fixture()
def part():
    torch.manual_seed(0)
    part = SMALL.build()
    for w in part.weigh:
        w.copy_(torch.rand_like(w))
    return part


def pictures(n=2):
    torch.manual_seed(1)
    return torch.rand(n, 3, 8, 8) * 2 - 1, torch.rand(n, 3, 8, 8) * 2 - 1


def slow(part, x, y):
    """The equation place by place."""
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = 0.0
    seen = [part.tower.features((p[None] - mean.view(3, 1, 1)) / std.view(3, 1, 1)) for p in (x, y)]
    for i, w in zip((0, 2), part.weigh, strict=True):
        a, b = (maps[i][0] for maps in seen)
        places = [float((w * (a[:, i, j] / (a[:, i, j].norm() + 1e-10) - b[:, i, j] / (b[:, i, j].norm() + 1e-10)) ** 2).sum())
                  for i in range(a.shape[1]) for j in range(a.shape[2])]
        total += sum(places) / len(places)
    return total


@torch.no_grad()
def test_it_is_the_equation(part):
    x, y = pictures()
    torch.testing.assert_close(part(x, y), torch.tensor([slow(part, a, b) for a, b in zip(x, y, strict=True)]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_is_a_distance_of_each_picture_alone(part):
    x, y = pictures()
    assert float(part(x, x).abs().max()) == 0 and bool((part(x, y) > 0).all())
    torch.testing.assert_close(part(x, y), part(y, x))
    torch.testing.assert_close(part(x, y), torch.cat([part(x[:1], y[:1]), part(x[1:], y[1:])]))


def test_a_gradient_reaches_the_picture_and_no_weight(part):
    x, y = pictures()
    y.requires_grad_()
    part(x, y).sum().backward()
    assert float(y.grad.abs().sum()) > 0 and all(p.grad is None and not p.requires_grad for p in part.parameters())


@torch.no_grad()
def test_channels_count_as_weighed(part):
    x, y = pictures()
    for w in part.weigh:
        w.zero_()
    assert float(part(x, y).abs().max()) == 0
    part.weigh[1][2] = 1.0
    maps = [part.maps(p)[1][:, 2] for p in (x, y)]
    torch.testing.assert_close(part(x, y), (maps[0] - maps[1]).square().mean((1, 2)))


def test_a_vgg_lends_its_convolutions(part):
    theirs = {k.removeprefix("tower."): torch.full_like(v, 0.5) for k, v in part.state_dict().items() if k.startswith("tower.")}
    taken = part.take_over(theirs | {"hidden.0.weight": torch.zeros(3)})
    part.load_state_dict(taken)
    assert all(bool((v == 0.5).all()) for k, v in part.state_dict().items() if k.startswith("tower.")) and not bool((part.weigh[0] == 0.5).all())
    assert part.take_over(part.state_dict()).keys() == part.state_dict().keys()


def test_what_cannot_be_is_refused(part):
    with pytest.raises(UserError, match="maps 0 to 2"):
        SMALL.but(seen=(0, 3)).build()
    with pytest.raises(UserError, match="3"):
        part(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_the_published_one_is_vgg_16():
    with torch.device("meta"):
        part = Perceptual.Config().build()
    assert sum(p.numel() for p in part.tower.parameters()) == 14_714_688 and [len(w) for w in part.weigh] == [64, 128, 256, 512, 512]
