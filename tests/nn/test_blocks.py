"""Blocks, transformer, MLPs, norms: what each switch does."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polysense.base.errors import UserError
from polysense.nn.activation import ACTIVATIONS, activation
from polysense.nn.attention import Attention
from polysense.nn.block import PostNorm, PreNorm
from polysense.nn.drop import drop_path, residual
from polysense.nn.init import ClipInit, NormalInit, XavierInit
from polysense.nn.mlp import MLP, GatedMLP
from polysense.nn.norm import LayerNorm, RMSNorm
from polysense.nn.transformer import Transformer


@torch.no_grad()
def test_pre_and_post_norm_follow_their_equations():
    x = torch.randn(2, 5, 8)
    pre, post = PreNorm.Config(width=8, heads=2).build(), PostNorm.Config(width=8, heads=2).build()
    y = x + pre.attn(pre.norm1(x))
    torch.testing.assert_close(pre(x), y + pre.mlp(pre.norm2(y)))
    y = post.norm1(x + post.attn(x))
    torch.testing.assert_close(post(x), post.norm2(y + post.mlp(y)))
    assert post(100 * x).std().item() == pytest.approx(1, abs=0.1) and pre(100 * x).std() > 50


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
@torch.no_grad()
def test_cross_attention_stands_between_and_is_silent_without_a_source(kind: type):
    block = kind.Config(width=8, heads=2, cross=Attention.Config(source=6)).build()
    x, source = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4:] = False
    torch.testing.assert_close(block(x, source, source_mask=mask), block(x, source[:, :4]))
    assert not torch.allclose(block(x, source), block(x))
    plain = kind.Config(width=8, heads=2).build()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if "cross" not in k})
    torch.testing.assert_close(block(x), plain(x))


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
@torch.no_grad()
def test_a_body_at_one_token_equals_the_whole_body_there(kind: type):
    body = Transformer.Config(width=8, depth=3, heads=2, block=kind.Config(layer_scale=0.5)).build()
    x, at, rows = torch.randn(2, 5, 8), torch.tensor([2, 4]), torch.arange(2)
    padding = torch.arange(5) < torch.tensor([[4], [5]])
    for keyword in ({}, {"causal": True}, {"mask": padding}, {"mask": padding, "causal": True}):
        torch.testing.assert_close(body(x, at=at, **keyword)[:, 0], body(x, **keyword)[rows, at])


@torch.no_grad()
def test_layer_scale_starts_at_its_value_and_zero_makes_the_identity():
    x = torch.randn(2, 5, 8)
    block = PreNorm.Config(width=8, heads=2, layer_scale=1e-4).build()
    assert (block(x) - x).abs().max() < 1e-2 and torch.equal(block.scale1, torch.full((8,), 1e-4))
    assert torch.equal(PreNorm.Config(width=8, heads=2, layer_scale=0.0).build()(x), x)


def test_drop_path_keeps_the_expectation_and_drops_whole_samples():
    x = torch.ones(20000, 3, 2)
    y = drop_path(x, 0.3, True)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert {round(v, 4) for v in y.unique().tolist()} == {0.0, round(1 / 0.7, 4)} and (y.flatten(1).std(1) == 0).all()
    assert drop_path(x, 0.3, False) is x
    body = Transformer.Config(width=8, depth=4, heads=2, drop_path=0.3).build()
    assert [round(b.drop_path, 6) for b in body.blocks] == [0.0, 0.1, 0.2, 0.3]
    x = torch.randn(64, 3, 8)
    always = PreNorm.Config(width=8, heads=2, drop_path=1 - 1e-9).build()
    assert torch.equal(always(x), x) and not torch.equal(always.eval()(x), x)


def test_stochastic_depth_computes_nothing_for_what_it_drops_and_gives_the_same_numbers_and_gradients():
    x, mask, seen = torch.randn(16, 3, 8, requires_grad=True), torch.rand(16, 3) > 0.2, []
    layer = torch.nn.Linear(8, 8)

    def branch(x, mask):
        seen.append(len(x))
        return layer(x) * mask[..., None]

    def both(function):
        torch.manual_seed(3)
        y = function()
        return y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))
    plain = both(lambda: x + drop_path(branch(x, mask), 0.5, True))
    ours = both(lambda: residual(x, branch, 0.5, True, mask))
    torch.testing.assert_close(ours, plain)
    assert seen[0] == 16 and 0 < seen[1] < 16
    nobody, *gradients = both(lambda: residual(x, branch, 1 - 1e-9, True, mask))
    assert torch.equal(nobody, x) and not gradients[1].any(), "a gradient of every weight, though it is zero"


def test_a_block_with_a_mask_for_each_sample_drops_rows_of_both():
    x, mask = torch.randn(12, 5, 8), torch.arange(5) < torch.randint(2, 6, (12, 1))
    block = PreNorm.Config(width=8, heads=2, drop_path=0.4).build()
    for given in (mask, torch.randn(1, 2, 5, 5, requires_grad=True), None):
        torch.manual_seed(0)
        ours = block(x, mask=given)
        torch.manual_seed(0)
        y = x + drop_path(block.attn(block.norm1(x), mask=given), 0.4, True)
        torch.testing.assert_close(ours, y + drop_path(block.mlp(block.norm2(y)), 0.4, True))


def test_dropout_is_off_in_eval_and_scales_in_training():
    block = PreNorm.Config(width=8, heads=2, dropout=0.5, mlp=MLP.Config(dropout=0.5)).build()
    x = torch.randn(2, 3, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_transformer_layers_can_be_split_and_mixed():
    kinds = (PreNorm.Config(), PreNorm.Config(mlp=GatedMLP.Config()), PreNorm.Config(cross=Attention.Config(source=4)))
    body = Transformer.Config(width=8, depth=3, heads=2, block=kinds).build()
    x, source = torch.randn(2, 5, 8), torch.randn(2, 3, 4)
    whole = body.layers(x, source)
    assert len(whole) == 4 and torch.equal(whole[0], x)
    front = body.layers(x, source, stop=1)
    assert torch.equal(body.layers(front[-1], source, start=1)[-1], whole[-1]) and torch.equal(body.norm(whole[-1]), body(x, source))
    with pytest.raises(UserError, match="2 blocks for a depth of 3"):
        Transformer.Config(width=8, depth=3, heads=2, block=kinds[:2]).build()


@torch.no_grad()
def test_mlps_follow_their_equations():
    x = torch.randn(4, 8)
    m = MLP.Config(width=8, hidden=12, out=5, act="relu").build()
    torch.testing.assert_close(m(x), m.down(m.up(x).clamp(min=0)))
    g = GatedMLP.Config(width=8, hidden=12).build()
    torch.testing.assert_close(g(x), (F.silu(x @ g.gate.weight.T) * (x @ g.up.weight.T)) @ g.down.weight.T)
    assert MLP.Config(width=8).build().up.out_features == 32 and g.gate.bias is None


def test_quick_gelu_is_its_formula_twice_differentiable_and_keeps_the_input_only():
    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(activation("quick_gelu")(x), x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(activation("quick_gelu"), (x,)) and torch.autograd.gradgradcheck(activation("quick_gelu"), (x,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        activation("quick_gelu")(x)
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()
    assert (activation("quick_gelu")(x) - F.gelu(x)).abs().max() < 0.03
    with pytest.raises(UserError, match="quick_gelu"):
        activation("quickgelu")
    assert set(ACTIVATIONS) == {"gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "squared_relu", "tanh"}


def test_norms_follow_their_equations_and_read_bfloat16():
    x = torch.randn(3, 8) * 5 + 2
    r = RMSNorm.Config(width=8, eps=1e-3).build()
    torch.testing.assert_close(r(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt())
    assert LayerNorm.Config(width=8, eps=1e-12).build().eps == 1e-12
    for norm in (r, LayerNorm.Config(width=8).build()):
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == torch.float32
            torch.testing.assert_close(norm(x.bfloat16()).float(), norm(x), atol=0.05, rtol=0.05)


def test_initialisations_have_the_papers_deviations():
    def deviation(init, name: str) -> float:
        body = Transformer.Config(width=256, depth=8, heads=4, init=init).build()
        return dict(body.named_parameters())[f"blocks.3.{name}.weight"].std().item()
    written = 256 ** -0.5 * 16 ** -0.5
    for name, std in [("attn.q", 256 ** -0.5), ("attn.out", written), ("mlp.up", 512 ** -0.5), ("mlp.down", written)]:
        assert deviation(ClipInit.Config(), name) == pytest.approx(std, rel=0.02)
    assert deviation(NormalInit.Config(std=0.02), "mlp.up") == pytest.approx(0.02 * 0.88, rel=0.02)       # cut at two deviations
    assert deviation(XavierInit.Config(), "mlp.up") == pytest.approx((2 / (256 + 1024)) ** 0.5, rel=0.02)
    body = Transformer.Config(width=16, depth=1, heads=2).build()
    assert all(m.bias.abs().max() == 0 for m in body.modules() if isinstance(m, nn.Linear))
