"""VGG's essence (Simonyan & Zisserman 2015)."""
from types import SimpleNamespace

import pytest
import torch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.train.starts import carry

recipe = polysense.load("vgg")


@pytest.mark.parametrize("name, count", [("paper", 138_357_544), ("vgg19", 143_667_240), ("paper_a", 132_863_336)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in preset_of("vgg", name).config.build().parameters()) == count


@pytest.mark.parametrize("kind, per_stage", [("A", [1, 1, 2, 2, 2]), ("D", [2, 2, 3, 3, 3]), ("E", [2, 2, 4, 4, 4])])
def test_only_3x3_convolutions_of_the_widths_of_table_1_and_no_norm(kind, per_stage):
    with torch.device("meta"):
        net = recipe.net(kind, classes=3).build().backbone
    assert [len(s) for s in net.stages] == per_stage
    assert [s[-1].conv.out_channels for s in net.stages] == [64, 128, 256, 512, 512]
    for row in net.rows:
        assert (row.conv.kernel_size, row.conv.stride, row.conv.padding) == ((3, 3), (1, 1), (1, 1)) and row.norm is None
    assert [row.pool is not None for row in net.rows] == [k == n - 1 for n in per_stage for k in range(n)]


def test_three_convolutions_see_seven_pixels():
    net = recipe.net("E", classes=3, base=4, grid=1, hidden=8, std=None).build().backbone
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    first = net.stages[2][0].active(image.new_zeros(1, 8, 16, 16).normal_().requires_grad_())
    x = first.detach().requires_grad_()
    y = net.stages[2][3].active(net.stages[2][2].active(net.stages[2][1].active(x)))
    y[0, :, 8, 8].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[5:12, 5:12].any() and not seen[:5].any() and not seen[12:].any() and not seen[:, :5].any() and not seen[:, 12:].any()
    assert seen.nonzero().max() <= 11 and seen.nonzero().min() >= 5


@torch.no_grad()
def test_dense_evaluation_is_the_forward_pass_at_the_size_of_training_and_its_mean_over_places_on_larger_ones():
    torch.manual_seed(0)
    vgg = recipe.net("A", classes=5, base=4, grid=2, hidden=16, std=None).build().eval()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vgg.class_map(image)[:, 0, 0], vgg.classify(image), rtol=1e-5, atol=1e-5)
    large = torch.randn(2, 3, 96, 128)
    windows = vgg.class_map(large)
    assert windows.shape == (2, 2, 3, 5)
    hidden = vgg.backbone.map(large)[..., 0:2, 1:3].flatten(1)            # one window by hand
    for layer in vgg.backbone.hidden:
        hidden = layer(hidden).relu()
    torch.testing.assert_close(windows[:, 0, 1], vgg.head(hidden), rtol=1e-5, atol=1e-5)
    want = (windows.mean((1, 2)).softmax(-1) + vgg.class_map(large.flip(-1)).mean((1, 2)).softmax(-1)) / 2
    torch.testing.assert_close(vgg.classify_densely(large), want)
    with pytest.raises(UserError, match="smaller than"):
        vgg.class_map(image[..., :32, :32])


def test_a_lends_d_seven_layers_bit_for_bit_and_nothing_else():
    torch.manual_seed(0)
    a, d = preset_of("vgg").config.build(), preset_of("vgg", "deeper").config.build()
    before = {k: v.clone() for k, v in d.state_dict().items()}
    for start in preset_of("vgg", "deeper").starts:
        carry(start, SimpleNamespace(system=a), d)
    lent = {f"backbone.{n}" for n in ("stages.0.0.conv", "stages.1.0.conv", "stages.2.0.conv", "stages.2.1.conv", "hidden.0", "hidden.1")} | {"head"}
    for name, value in d.state_dict().items():
        if name.rpartition(".")[0] in lent:
            assert torch.equal(value, a.state_dict()[name])
        else:
            assert torch.equal(value, before[name])
    assert len(lent) == 7


def test_the_rest_starts_from_a_normal_of_a_hundredth_or_from_glorot():
    net = recipe.net("D", classes=3, base=32, grid=1, hidden=64).build()
    weight = net.backbone.stages[4][2].conv.weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.05) and not net.backbone.stages[4][2].conv.bias.any()
    glorot = recipe.net("D", classes=3, base=32, grid=1, hidden=64, std=None).build().backbone.stages[4][2].conv.weight
    assert glorot.std().item() == pytest.approx((2 / (2 * 256 * 9)) ** 0.5, rel=0.05)


def test_dropout_stands_behind_the_hidden_dense_layers():
    torch.manual_seed(0)
    net = preset_of("vgg", "paper").config.backbone.but(rows=preset_of("vgg").config.backbone.rows, grid=1, hidden=(64, 64)).build().train()
    out = net(torch.randn(4, 3, 32, 32) * 50).pooled
    with torch.no_grad():
        net.hidden[1].bias.fill_(1.0)
    out = net(torch.randn(4, 3, 32, 32)).pooled
    assert 0.3 < float((out == 0).float().mean()) < 0.7 and float(net.eval()(torch.randn(1, 3, 32, 32)).pooled.detach().min()) > 0


def test_the_shorter_side_is_drawn_from_256_to_512():
    plan = preset_of("vgg", "paper").feed.train_image
    assert plan.sides == (256, 512) and plan.size == 224
    from polysense.data import views
    boxes = views.crops(plan, views.draw(0, 0, 0, 400).u[:, :22], torch.tensor([[600, 400]] * 400))
    side = boxes[:, 2] - boxes[:, 0]
    torch.testing.assert_close(side, boxes[:, 3] - boxes[:, 1])
    assert 175 <= side.min() < 185 and 335 < side.max() <= 350, "224/512 and 224/256 of 400 pixels"
    assert boxes[:, [0, 1]].min() >= 0 and boxes[:, 2].max() <= 600 and boxes[:, 3].max() <= 400
