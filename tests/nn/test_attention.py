"""Attention against a naive softmax, its masks, cache and rotary embedding."""
import pytest
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.nn.attention import Attention, attend, attention_mask, causal_mask
from polysense.nn.block import PostNorm, PreNorm
from polysense.nn.mlp import GatedMLP
from polysense.nn.norm import RMSNorm
from polysense.nn.rotary import Rotary
from polysense.nn.transformer import Transformer


def naive(a: Attention, x: Tensor, source: Tensor, allowed: Tensor) -> Tensor:
    """One sample, one head, one query at a time; allowed [B,T,S]."""
    out = torch.zeros(*x.shape[:2], a.heads * a.head_width)
    for b in range(len(x)):
        for n in range(a.heads):
            mine, theirs = (slice(i * a.head_width, (i + 1) * a.head_width) for i in (n, n * a.kv_heads // a.heads))
            for t in range(x.shape[1]):
                q, k, v = a.q(x[b, t])[mine], a.k(source[b])[:, theirs], a.v(source[b])[:, theirs]
                seen = allowed[b, t].nonzero()[:, 0]
                weight = torch.softmax((k[seen] @ q) / a.head_width ** 0.5, 0)
                assert weight.sum().item() == pytest.approx(1, abs=1e-5)
                out[b, t, mine] = weight @ v[seen]
    return a.out(out)


@pytest.mark.parametrize("kv_heads", [None, 2])
@torch.no_grad()
def test_equals_the_naive_twin_with_every_kind_of_mask(kv_heads: int | None):
    a = Attention.Config(width=16, heads=4, kv_heads=kv_heads).build()
    x, every = torch.randn(2, 5, 16), torch.ones(2, 5, 5, dtype=torch.bool)
    padding = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    free = torch.rand(2, 5, 5) > 0.4
    free[..., 0] = True
    for keyword, allowed in [({}, every), ({"causal": True}, every.tril()), ({"mask": padding}, every & padding[:, None]), ({"mask": free}, free),
                             ({"mask": free[:, None]}, free), ({"mask": padding, "causal": True}, every.tril() & padding[:, None])]:
        torch.testing.assert_close(a(x, **keyword), naive(a, x, x, allowed), atol=1e-5, rtol=1e-4)
    added = torch.zeros(2, 5, 5).masked_fill(~free, -torch.inf)
    torch.testing.assert_close(a(x, mask=added), a(x, mask=free))
    torch.testing.assert_close(a(x, mask=torch.zeros(1, 5, 5), causal=True), a(x, causal=True))


@torch.no_grad()
def test_cross_attention_reads_another_width_and_length():
    a = Attention.Config(width=16, heads=2, source=6, out_width=3, bias="v").build()
    x, source = torch.randn(2, 4, 16), torch.randn(2, 7, 6)
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    torch.testing.assert_close(a(x, source, mask=mask), naive(a, x, source, mask[:, None].expand(-1, 4, -1)), atol=1e-5, rtol=1e-4)
    assert a.q.bias is None and a.v.bias is not None and a.k.in_features == 6


def test_a_masked_key_gets_no_gradient():
    a = Attention.Config(width=8, heads=2).build()
    x = torch.randn(1, 4, 8, requires_grad=True)
    a(x, mask=torch.tensor([[True, True, True, False]]))[:, :3].sum().backward()
    assert x.grad[0, 3].abs().max() == 0 and x.grad[0, :3].abs().min() > 0


@torch.no_grad()
def test_value_path_is_attention_to_oneself_alone():
    a = Attention.Config(width=8, heads=4, kv_heads=2).build()
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(a.values(x), a(x, mask=torch.eye(5, dtype=torch.bool)[None]))


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
@torch.no_grad()
def test_generation_with_a_cache_equals_the_full_forward(kind: type):
    block = kind.Config(attn=Attention.Config(kv_heads=2, rope=Rotary.Config(), norm_qk=RMSNorm.Config(), bias=""), norm=RMSNorm.Config(),
                        mlp=GatedMLP.Config())
    body = Transformer.Config(width=16, depth=3, heads=4, block=block, norm=RMSNorm.Config()).build()
    x = torch.randn(2, 9, 16)
    whole, cache = body(x, causal=True), body.cache(batch=2, length=9)
    pieces = [body(part, causal=True, cache=cache) for part in x.split([4, 1, 3, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)
    assert cache.length == 9
    with pytest.raises(UserError, match="do not fit"):
        body(x[:, :1], causal=True, cache=cache)
    cache.rewind(8)
    cache.pick(torch.tensor([1, 1, 0]))
    again = body(x[[1, 1, 0], 8:], causal=True, cache=cache)
    torch.testing.assert_close(again, whole[[1, 1, 0], 8:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_rotary_depends_on_the_distance_only_and_keeps_lengths():
    rope = Rotary.Config(width=8).build()
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    def score(i: float, j: float) -> float:
        return (rope(q, torch.tensor([i])) * rope(k, torch.tensor([j]))).sum().item()
    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4) and score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)
    assert rope(q, torch.tensor([17.0])).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    torch.testing.assert_close(rope(q, torch.tensor([0])), q)
    part, x = Rotary.Config(width=8, share=0.5).build(), torch.randn(2, 3, 4, 8)
    turned = part(x, torch.arange(4))
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.equal(turned[:, :, 1:, :4], x[:, :, 1:, :4])
    torch.testing.assert_close(rope(x, torch.arange(4).expand(2, 4)), rope(x, torch.arange(4)))


def test_dropout_of_the_weights_acts_in_training_only():
    a = Attention.Config(width=8, heads=2, dropout=0.5).build()
    x = torch.randn(1, 6, 8)
    assert not torch.equal(a(x), a(x))
    a.eval()
    assert torch.equal(a(x), a(x))


def test_autocast_lowers_the_products_and_leaves_the_residual_stream_in_float32():
    body = Transformer.Config(width=16, depth=2, heads=2).build()
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        layers = body.layers(x)
        assert body.blocks[0].attn(x).dtype == torch.bfloat16
    assert {t.dtype for t in layers} == {torch.float32}
    torch.testing.assert_close(layers[-1], body.layers(x)[-1], atol=0.05, rtol=0.05)


def test_impossible_shapes_are_refused():
    for config in (Attention.Config(width=10, heads=4), Attention.Config(width=8, heads=4, kv_heads=3), Attention.Config(width=8),
                   Rotary.Config(width=3)):
        with pytest.raises(UserError):
            config.build()


@pytest.mark.parametrize("keyword", [{}, {"causal": True}, {"mask": torch.tensor([[True] * 5, [True, True, False, False, False]])}], ids=str)
def test_plain_products_for_bfloat16_training_equal_the_fused_kernel(keyword: dict):
    q, k, v = (torch.randn(2, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = keyword.get("mask")
    given = {**keyword, "mask": attention_mask(mask) if mask is not None else None}
    plain = attend(q, k, v, **given)
    with torch.no_grad():
        fused = attend(q, k, v, **given)
    exact = attend(q.float(), k.float(), v.float(), **given)
    assert plain.dtype == fused.dtype == torch.bfloat16
    torch.testing.assert_close(plain.float(), exact, atol=0.03, rtol=0.03)
    torch.testing.assert_close(plain, fused, atol=0.03, rtol=0.03)
    probe = torch.randn(exact.shape)
    ours, theirs = (torch.autograd.grad((y.float() * probe).sum(), (q, k, v)) for y in (plain, exact))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=0.06, rtol=0.06)


@pytest.mark.parametrize("causal", [False, True])
def test_a_learned_bias_gives_what_the_fused_kernel_gives_and_its_gradient(causal):
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 3, 7, 7, requires_grad=True)
    earlier = causal_mask(7, 7, q.device)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~earlier, -torch.inf) if causal else bias)
    ours = attend(q, k, v, bias, causal)
    torch.testing.assert_close(ours, want)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), (q, k, v, bias)), torch.autograd.grad(want.square().sum(), (q, k, v, bias))):
        torch.testing.assert_close(a, b)
