"""AlexNet's essence (Krizhevsky et al. 2012)."""
from copy import deepcopy

import pytest
import torch

import polysense
from polysense.archetypes.classifier import ten_crops
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.norm import ResponseNorm

recipe = polysense.load("alexnet")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return preset_of("alexnet").config.build().eval()


@pytest.mark.parametrize("name, count", [("paper", 60_965_224), ("torchvision", 61_100_840)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in preset_of("alexnet", name).config.build().parameters()) == count


def test_layers_are_those_of_the_paper():
    with torch.device("meta"):
        net = preset_of("alexnet", "paper").config.build().backbone
    convs = [(r.conv.out_channels, r.conv.kernel_size[0], r.conv.stride[0], r.conv.groups) for r in net.rows]
    assert convs == [(96, 11, 4, 1), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 2), (256, 3, 1, 2)]
    assert [r.norm is not None for r in net.rows] == [True, True, False, False, False]
    assert [r.pool is not None for r in net.rows] == [True, True, False, False, True]
    assert all((r.pool.c.side, r.pool.c.stride) == (3, 2) for r in net.rows if r.pool is not None), "pools overlap"
    assert net.grid == 6 and [h.out_features for h in net.hidden] == [4096, 4096]


def test_224_pixels_make_six_by_six_places():
    net = recipe.net((4, 4, 4, 4, 4), preset_of("alexnet", "paper").config.backbone.rows[0], groups=1, hidden=8).build()
    assert net.backbone.map(torch.zeros(1, 3, 224, 224)).shape[-2:] == (6, 6)


def test_response_norm_is_the_closed_form():
    norm, a = ResponseNorm.Config().build(), torch.randn(2, 9, 4, 4) * 30
    want = torch.empty_like(a)
    for i in range(9):
        near = a[:, max(0, i - 2):i + 3].square().sum(1)
        want[:, i] = a[:, i] / (2 + 1e-4 * near) ** 0.75
    torch.testing.assert_close(norm(a), want, rtol=1e-6, atol=1e-6)
    assert bool(((norm(3 * a) / (3 * a)).abs() < (norm(a) / a).abs()).all()), "louder neighbours inhibit more"


def test_response_norm_stands_behind_the_relu(small):
    row, x = small.backbone.rows[0], torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(row(x), row.pool(row.norm(row.conv(x).relu())))


def test_two_groups_do_not_hear_each_other_and_the_third_layer_mixes_them(small):
    two, three = small.backbone.rows[1], small.backbone.rows[2]
    half = two.conv.in_channels // 2
    x = torch.randn(1, two.conv.in_channels, 9, 9)
    other = x.clone()
    other[:, half:] += torch.randn_like(other[:, half:])
    a, b = two.conv(x), two.conv(other)
    assert torch.equal(a[:, :a.shape[1] // 2], b[:, :a.shape[1] // 2]) and not torch.equal(a, b)
    y = torch.randn(1, three.conv.in_channels, 5, 5)
    moved = y.clone()
    moved[:, y.shape[1] // 2:] += 1
    assert bool((three.conv(y) != three.conv(moved)).flatten(2).any(-1).all()), "every channel hears both halves"


def test_initial_weights_are_small_and_the_named_biases_are_one():
    net = recipe.net((16, 32, 48, 48, 32), recipe.SMALL, grid=3, hidden=64, classes=5).build().backbone
    assert net.rows[2].conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert [float(r.conv.bias.detach().mean()) for r in net.rows] == [0, 1, 0, 1, 1] and [float(h.bias.detach().mean()) for h in net.hidden] == [1, 1]


def test_dropout_stands_before_the_first_two_dense_layers():
    torch.manual_seed(0)
    net = preset_of("alexnet").config.backbone.build().train()
    heard = []
    for layer in net.hidden:
        layer.register_forward_pre_hook(lambda m, x: heard.append(float((x[0] == 0).float().mean())))
    with torch.no_grad():
        net.rows[4].conv.bias.fill_(50.0)
        for layer in net.hidden:
            layer.weight.mul_(0.01)                                          # biases of 1 decide: nothing is zero but by dropout
            layer.bias.fill_(1.0)
    out = net(torch.randn(8, 3, 32, 32)).pooled
    assert 0.3 < heard[0] < 0.75 and 0.3 < heard[1] < 0.75 and float((out == 0).float().mean()) < 0.3


@torch.no_grad()
def test_ten_crops_are_averaged_as_probabilities(small):
    small, image = deepcopy(small), torch.randn(2, 3, 40, 44) * 10
    small.head.weight.mul_(50)                                            # decided enough that the two means differ
    crops = ten_crops(image, 32)
    want = torch.stack([small.classify(c).softmax(-1) for c in crops]).mean(0)
    torch.testing.assert_close(small.ten_crops(image, 32), want)
    assert not torch.allclose(want, torch.stack([small.classify(c) for c in crops]).mean(0).softmax(-1), atol=1e-4)
    assert torch.equal(crops[0], image[..., :32, :32]) and torch.equal(crops[4], image[..., 4:36, 6:38]) and torch.equal(crops[8], crops[3].flip(-1))
    with pytest.raises(UserError, match="no crops"):
        small.ten_crops(image, 64)


def test_training_cuts_a_square_anywhere_and_adds_one_colour_noise_a_picture():
    from polysense.data import views
    plan = preset_of("alexnet", "paper").feed.train_image
    assert (plan.size, plan.sides, plan.flip, plan.lighting) == (224, (256, 256), 0.5, 0.1)
    drawn = views.draw(0, 0, 0, 4000)
    noise = views.colours(plan, drawn, torch.zeros(4000, 3, 2, 2))
    assert torch.equal(noise, noise[..., :1, :1].expand_as(noise)), "one draw a picture"
    basis, root = torch.tensor(views.AXES), torch.tensor(views.SPREAD)
    along = (noise[:, :, 0, 0] @ basis) / root
    torch.testing.assert_close(along.std(0), torch.full((3,), 0.1), rtol=0.05, atol=0)
    assert float(torch.corrcoef(along.T).fill_diagonal_(0).abs().max()) < 0.06
    boxes = views.crops(plan, drawn.u[:, :22], torch.tensor([[256, 256]] * 4000))
    torch.testing.assert_close(boxes[:, 2] - boxes[:, 0], torch.full((4000,), 224.0, dtype=torch.float64))
    assert boxes[:, 0].min() < 1 and boxes[:, 0].max() > 31


def test_a_picture_too_small_for_the_pools_is_refused(small):
    with pytest.raises(UserError, match="larger picture"):
        small.classify(torch.randn(1, 3, 4, 4))
