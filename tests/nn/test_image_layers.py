"""Patches, positions, convolutions, residual blocks, heads."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from polysense.base.errors import UserError
from polysense.nn.conv import Conv, StandardisedConv
from polysense.nn.head import Linear, LinearBias, Nothing, Projector, TanhHead
from polysense.nn.norm import GroupNorm, freeze_norm
from polysense.nn.patch import Patches
from polysense.nn.position import fit_positions
from polysense.nn.residual import Basic, Bottleneck, Pad, Project


def test_patch_embedding_equals_the_convolution_with_its_gradient():
    patches, image = Patches(3, 16, 4), torch.randn(2, 3, 8, 12, requires_grad=True)
    ours, theirs = patches(image), F.conv2d(image, patches.weight, patches.bias, 4).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    probe = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * probe).sum(), (image, patches.weight)),
                    torch.autograd.grad((theirs * probe).sum(), (image, patches.weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="1 channels"):
        patches(torch.randn(1, 1, 8, 8))
    with pytest.raises(UserError, match="9x8 pixels"):
        patches(torch.randn(1, 3, 9, 8))


def test_interpolating_positions():
    position = torch.randn(1, 1 + 16, 8)
    assert fit_positions(position, 1, (4, 4)) is position
    larger = fit_positions(position, 1, (8, 6))
    assert larger.shape == (1, 1 + 48, 8) and torch.equal(larger[:, 0], position[:, 0])
    constant = torch.ones(1, 16, 3)
    torch.testing.assert_close(fit_positions(constant, 0, (7, 3)), torch.ones(1, 21, 3))
    ramp = torch.arange(8.0).repeat_interleave(8)[None, :, None]                   # grows downwards: still does after shrinking, and not sideways
    small = fit_positions(ramp, 0, (4, 4)).view(4, 4)
    assert (small.diff(dim=0) > 1).all() and small.diff(dim=1).abs().max() < 1e-4
    wide = torch.randn(1, 8, 3)
    assert fit_positions(wide, 0, (2, 4), (2, 4)) is wide
    with pytest.raises(UserError, match="do not form a grid"):
        fit_positions(wide, 0, (2, 4))


@pytest.mark.parametrize("kind,norm", [(Basic, "norm2"), (Bottleneck, "norm3")])
@torch.no_grad()
def test_a_block_with_zero_last_norm_is_relu_of_its_shortcut(kind: type, norm: str):
    x = torch.randn(2, 8, 8, 8)
    for stride, into in ((1, 8 * kind.expansion), (2, 8)):
        block = kind.Config(into=into, width=8, stride=stride).build()
        x = torch.randn(2, into, 8, 8)
        before = block(x)
        getattr(block, norm).weight.zero_()
        shortcut = x if block.shortcut is None else block.shortcut(x)
        assert (block.shortcut is None) == (stride == 1)
        assert torch.equal(block(x), shortcut.relu()) and not torch.equal(before, block(x))
        born = kind.Config(into=into, width=8, stride=stride, last_gamma=0.0).build()
        assert getattr(born, norm).weight.abs().max() == 0


@torch.no_grad()
def test_shortcuts():
    x = torch.randn(2, 4, 6, 6)
    pad = Pad.Config(into=4, out=10, stride=2).build()
    assert not list(pad.parameters()) and pad(x).shape == (2, 10, 3, 3) and torch.equal(pad(x)[:, 3:7], x[..., ::2, ::2])
    assert pad(x)[:, :3].abs().max() == 0 and pad(x)[:, 7:].abs().max() == 0
    project = Project.Config(into=4, out=10, stride=2, stride_in="pool").build().eval()
    torch.testing.assert_close(project(x), project.norm(project.conv(F.avg_pool2d(x, 2))))
    plain = Basic.Config(into=4, width=10, stride=2, shortcut=None).build().eval()
    assert plain.shortcut is None and torch.equal(plain(x), plain.branch(x).relu())
    grouped = Bottleneck.Config(into=4, width=8, stride=2, norm=GroupNorm.Config(groups=4), conv=StandardisedConv.Config()).build()
    assert isinstance(grouped.shortcut.norm, GroupNorm) and isinstance(grouped.shortcut.conv, StandardisedConv)


@torch.no_grad()
def test_where_the_stride_sits_changes_outputs_not_names_or_shapes():
    blocks = [Bottleneck.Config(into=16, width=8, stride=2, stride_in=s).build().eval() for s in ("1x1", "3x3", "pool")]
    shapes = [{k: v.shape for k, v in b.state_dict().items()} for b in blocks]
    for b in blocks[1:]:
        b.load_state_dict(blocks[0].state_dict())
    outs = [b(torch.linspace(-1, 1, 2 * 16 * 64).view(2, 16, 8, 8)) for b in blocks]
    assert shapes[0] == shapes[1] == shapes[2] and outs[0].shape == outs[1].shape == outs[2].shape
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])
    for config in (Bottleneck.Config(into=4, width=4, stride_in="5x5"), Project.Config(into=4, out=4, stride=1, stride_in="3x3")):
        with pytest.raises(UserError, match="stride_in"):
            config.build()


def test_standardised_filters_and_he_initialisation():
    conv = StandardisedConv.Config(into=6, out=8, kernel=3).build()
    with torch.no_grad():
        x = torch.randn(1, 6, 5, 5)
        before = conv(x)
        conv.weight.mul_(3).add_(0.7)                                               # scale and offset of a filter are standardised away
        torch.testing.assert_close(conv(x), before, atol=1e-3, rtol=1e-3)
    he = Conv.Config(into=64, out=128, kernel=3).build().weight
    assert he.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_frozen_norm_keeps_its_statistics_in_training_and_through_copies():
    block = freeze_norm(Basic.Config(into=4, width=4, stride=1).build())
    for b in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        b.train()
        assert b.training and not b.norm1.training
        b(torch.randn(4, 4, 6, 6) + 5)
        assert b.norm1.running_mean.abs().max() == 0 and not b.norm1.weight.requires_grad and b.conv1.weight.requires_grad
    free = Basic.Config(into=4, width=4, stride=1).build()
    free(torch.randn(4, 4, 6, 6) + 5)
    assert free.norm1.running_mean.abs().max() > 0


def test_heads():
    x = torch.randn(6, 8)
    linear = Linear.Config(into=8, out=4).build()
    assert linear.bias is None and Linear.Config(into=4096, out=64).build().weight.std().item() == pytest.approx(1 / 64, rel=0.02)
    assert torch.equal(LinearBias.Config(into=8, out=3, std=0.0).build()(x), torch.zeros(6, 3))
    assert Nothing.Config().build()(x) is x
    tanh = TanhHead.Config(into=8, hidden=5, out=3).build()
    torch.testing.assert_close(tanh(x), tanh.out(tanh.pre(x).tanh()))
    torch.testing.assert_close(TanhHead.Config(into=8, hidden=5).build()(100 * x).abs() <= 1, torch.ones(6, 5, dtype=torch.bool))
    slip = Projector.Config(widths=(8, 16, 16, 4)).build()
    names = {n.rsplit(".", 1)[0] for n, _ in slip.named_parameters()}
    assert names == {"layers.0.linear", "layers.0.norm", "layers.1.linear", "layers.1.norm", "layers.2.linear"}
    hidden = slip.layers[0].norm(slip.layers[0].linear(x))
    torch.testing.assert_close(hidden.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(slip(x), slip.layers[2].linear(slip.layers[1].norm(slip.layers[1].linear(hidden.relu())).relu()))
