"""NF4 against its definition; against bitsandbytes in tests/parity/test_adapters.py."""
from itertools import pairwise

import pytest
import torch
from torch import nn

from polysense.base.errors import UserError
from polysense.mechanisms.lora import bare, merge
from polysense.mechanisms.nf4 import LEVELS, NF4Linear, QuantisedLowRank, constants, dequantise, dynamic_levels, quantise, restore


def test_the_levels_are_the_normalised_quantiles_of_a_normal_distribution():
    """Appendix E: eight quantiles above zero and seven below, between 1 - offset and one half, over the largest."""
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    up = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([up, torch.zeros(1), down]).sort().values / up.max()
    torch.testing.assert_close(levels, torch.tensor(LEVELS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("double", [0, 256])
@pytest.mark.parametrize("shape", [(64, 64), (7, 13), (3, 3), (300, 257)])
def test_errors_zeros_and_what_comes_back(shape, double):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=g)
    w.view(-1)[::5] = 0
    q = quantise(w, double)
    back = dequantise(q)
    assert back.shape == w.shape and q.codes.dtype == torch.uint8
    widest = max(b - a for a, b in pairwise(LEVELS))
    rows = nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    absmax = rows.abs().amax(1)
    if not double:
        torch.testing.assert_close(constants(q), absmax, atol=0, rtol=0)
        error = nn.functional.pad((back - w).flatten(), (0, -w.numel() % 64)).view(-1, 64).abs().amax(1)
        assert (error <= widest / 2 * absmax + 1e-6).all()
        assert torch.equal(back == 0, back.abs() < 1e-12)
        again = quantise(back, double)
        assert torch.equal(again.codes, q.codes) and torch.equal(dequantise(again), back), "quantising again changes nothing"
    else:
        assert (constants(q) - absmax).abs().max() <= 0.05 * (absmax - absmax.mean()).abs().max() + 1e-6
    assert (back.flatten()[w.flatten() == 0] == 0).all(), "zero is a level"


def test_a_block_of_zeros_and_constant_weights_survive():
    w = torch.zeros(128)
    w[64:] = -3.0
    assert torch.equal(dequantise(quantise(w, 0)), w)


def test_bits_a_weight():
    w = torch.randn(1024, 1024)
    assert quantise(w, 0).bits == 4.5
    assert quantise(w).bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3) and quantise(w).bits < 4.13


def test_the_dynamic_levels():
    levels = dynamic_levels()
    assert len(levels) == 256 == len(levels.unique()) and (levels.diff() > 0).all() and levels[-1] == 1 and 0 in levels
    assert levels[0] == pytest.approx(-0.9929688) and levels.abs()[levels != 0].min() == pytest.approx(0.55e-6)


def layer(bias=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 70, bias=bias))
    plain = net[0].weight.detach().clone()
    QuantisedLowRank(rank=4, alpha=8.0, dropout=0.0, on="0").put(net)
    return net, plain


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_pass_through_the_dequantised_weight_to_the_input_and_the_update(bias):
    net, plain = layer(bias)
    dense = nn.Linear(96, 70)
    with torch.no_grad():
        net[0].lora["default"].B.normal_()
        dense.weight.copy_(dequantise(quantise(plain)) + net[0].lora["default"].delta())
        dense.bias.copy_(net[0].bias if bias else torch.zeros(70))
    x = torch.randn(5, 3, 96, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    a, b = net(x), dense(twin)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-3, rtol=1e-3)
    one = net[0].lora["default"]
    assert one.A.grad.abs().sum() > 0 and one.B.grad.abs().sum() > 0
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"0.lora.default.A", "0.lora.default.B"}


def test_codes_never_change_and_nothing_dense_is_kept():
    net, _ = layer()
    before = {k: v.clone() for k, v in net.named_buffers()}
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    kept = []
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = net(torch.randn(2, 96)).square().sum()
        loss.backward()
        opt.step()
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    assert "0.weight" not in net.state_dict() and max(kept) < 96 * 70, "the dense weight is not kept for the backward pass"
    assert isinstance(net[0], NF4Linear)


def test_a_quantised_layer_is_restored_before_it_can_be_merged():
    net, _ = layer()
    with torch.no_grad():
        net[0].lora["default"].B.normal_()
    x = torch.randn(4, 96)
    out = net(x)
    with pytest.raises(UserError, match="quantised"):
        merge(net)
    restore(net)
    torch.testing.assert_close(net(x), out, atol=1e-4, rtol=1e-4)
    merge(net)
    bare(net)
    torch.testing.assert_close(net(x), out, atol=1e-4, rtol=1e-4)
    assert type(net[0]) is nn.Linear


def test_a_start_of_plain_weights_is_quantised_on_the_way_in():
    net, plain = layer()
    other = torch.randn_like(plain)
    took = net[0].take_over({"weight": other, "bias": torch.ones(70)})
    assert set(took) == {k.removeprefix("0.") for k in net.state_dict()} and torch.equal(took["codes"], quantise(other).codes)
