"""LeNet-5's essence (LeCun et al. 1998)."""
import math

import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.towers import lenet

recipe = polysense.load("lenet5")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return preset_of("lenet5").config.build()


def test_sixty_thousand_parameters_layer_by_layer_and_fixed_codes(net):
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in net.backbone.named_children()}
    assert {k: v for k, v in count.items() if v} == {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48_120, "f6": 10_164}
    assert sum(p.numel() for p in net.parameters()) == 60_000
    assert not list(net.head.parameters()) and net.head.code.shape == (10, 84) and set(net.head.code.unique().tolist()) == {-1.0, 1.0}
    assert "head.code" in net.state_dict()


def test_sizes_of_the_maps(net):
    b, image = net.backbone, torch.randn(1, 3, 32, 32)
    x = b.c1(b.grey(image))
    assert x.shape == (1, 6, 28, 28)
    assert b.s2(x).shape == (1, 6, 14, 14) and b.c3(b.s2(x)).shape == (1, 16, 10, 10) and b.s4(b.c3(b.s2(x))).shape == (1, 16, 5, 5)
    assert b.c5(b.s4(b.c3(b.s2(x)))).shape == (1, 120, 1, 1)
    assert b(torch.randn(2, 3, 28, 28)).pooled.shape == (2, 84), "28 pixels are padded to 32"


def test_subsampling_averages_scales_shifts_and_squashes():
    layer = lenet.Subsample.Config(width=3).build()
    with torch.no_grad():
        layer.coefficient.copy_(torch.tensor([0.5, 1.0, -2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, 0.3]))
    x = torch.randn(2, 3, 6, 6)
    want = 1.7159 * torch.tanh(2 / 3 * (layer.coefficient[:, None, None] * F.avg_pool2d(x, 2) + layer.bias[:, None, None]))
    torch.testing.assert_close(layer(x), want)
    constant = layer(torch.full((1, 3, 6, 6), 0.7))
    assert float(constant.detach().flatten(2).std(-1).max()) < 1e-6
    assert sum(p.numel() for p in layer.parameters()) == 6


def test_squashing_keeps_plus_and_minus_one():
    torch.testing.assert_close(lenet.squash(torch.tensor([-1.0, 1.0])), torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-4)


def test_the_table_has_sixty_connections_of_the_published_kinds(net):
    sizes = [len(row) for row in lenet.TABLE]
    assert sizes == [3] * 6 + [4] * 9 + [6] and sum(sizes) == 60

    def contiguous(row):
        return any({(s + k) % 6 for k in range(len(row))} == set(row) for s in range(6))
    assert all(contiguous(r) for r in lenet.TABLE[:12]) and not any(contiguous(r) for r in lenet.TABLE[12:15])
    heard = torch.tensor([[i in row for i in range(6)] for row in lenet.TABLE])
    weight = net.backbone.c3.weight
    assert torch.equal(weight.abs().flatten(2).sum(-1) > 0, heard) and int((~heard).sum()) == 36


def test_no_gradient_flows_through_a_missing_connection(net):
    heard = torch.tensor([[i in row for i in range(6)] for row in lenet.TABLE])
    x = torch.randn(1, 6, 14, 14, requires_grad=True)
    for o in range(16):
        grad = torch.autograd.grad(net.backbone.c3(x)[:, o].sum(), x)[0].abs().sum((0, 2, 3))
        assert torch.equal(grad > 0, heard[o])


def test_outputs_are_squared_distances_to_the_codes(net):
    x = torch.randn(3, 84)
    want = ((x[:, None] - net.head.code[None]) ** 2).sum(-1)
    torch.testing.assert_close(-net.head(x), want)


def test_the_criterion_is_equation_9(net):
    image, label = torch.randn(3, 3, 28, 28), torch.tensor([0, 3, 9])
    y, want = -net.classify(image), []
    for row, t in zip(y, label):
        want.append(float(row[t]) + math.log(math.exp(-net.j) + sum(math.exp(-float(v)) for v in row)))
    got = net.losses({"image": image, "label": label})["map"]
    torch.testing.assert_close(got.detach(), torch.tensor(want).mean(), rtol=1e-5, atol=1e-5)
    assert float(got) > 0, "with a class of nothing the loss stays positive"


def test_weights_start_within_what_the_fan_in_allows(net):
    b = net.backbone
    for weight, heard in ((b.c1.weight, 25), (b.c5.weight, 400), (b.f6.weight, 120), (b.c3.kernels[:3], 75), (b.c3.kernels[-6:], 150)):
        limit = 2.4 / heard
        assert float(weight.abs().max()) <= limit and float(weight.abs().max()) > 0.8 * limit


def test_plain_mode_makes_sixteen_maps_of_five_by_five_of_28_and_of_32_pixels():
    for size in (28, 32):
        tower = recipe.plain_tower(size).build()
        assert tower.map(torch.randn(1, 3, size, size)).shape == (1, 16, 5, 5)
    convs = [(r.conv.kernel_size, r.conv.stride, r.pool.c.side) for r in tower.rows]
    assert convs == [((5, 5), (1, 1), 2)] * 2 and [h.out_features for h in tower.hidden] == [120, 84]


def test_plain_mode_trains_softmax_cross_entropy():
    torch.manual_seed(0)
    plan = preset_of("lenet5", "plain")
    system, batch = plan.config.build(), {"image": torch.randn(4, 3, 28, 28), "label": torch.tensor([0, 1, 2, 3])}
    got = plan.stages[0].objective(system, batch)["label"]
    torch.testing.assert_close(got, F.cross_entropy(system.classify(batch["image"]), batch["label"]))


def test_paper_and_ink_have_the_published_values():
    plan = preset_of("lenet5", "paper").feed.image
    mean, std = plan.mean[0], plan.std[0]
    assert (0 - mean) / std == pytest.approx(-0.1) and (1 - mean) / std == pytest.approx(1.175)


def test_twenty_passes_one_picture_at_a_time_at_falling_rates():
    stages = preset_of("lenet5", "paper").stages
    assert sum(s.steps for s in stages) == 20 * 60_000 and all(s.batch_size == 1 and s.optim.schedule == "constant" for s in stages)
    assert [s.optim.lr for s in stages] == [5e-4, 2e-4, 1e-4, 5e-5, 1e-5] and stages[0].objective is recipe.LeNet5.losses


def test_grey_pictures_must_come_as_three_channels(net):
    with pytest.raises(UserError, match="channels"):
        net.classify(torch.randn(1, 1, 28, 28))
