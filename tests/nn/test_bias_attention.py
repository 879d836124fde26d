"""The learned key and value, against torch's MultiheadAttention(add_bias_kv=True) and by hand."""
import pytest
import torch

from polysense.base.errors import UserError
from polysense.nn.attention import Attention, BiasAttention


def pair(width: int = 24, heads: int = 4):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True).eval()
    ours = BiasAttention.Config(width=width, heads=heads).build().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
        for part, weight, bias in zip((ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        ours.out.load_state_dict(theirs.out_proj.state_dict())
        ours.bias_k.copy_(theirs.bias_k.flatten())
        ours.bias_v.copy_(theirs.bias_v.flatten())
    return ours, theirs


def test_it_is_torchs():
    ours, theirs = pair()
    x, mask = torch.randn(2, 5, 24), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours(x, mask=mask), theirs(x, x, x, key_padding_mask=~mask)[0], atol=1e-5, rtol=1e-4)


def test_zeroed_it_is_one_extra_token_whose_key_and_value_are_zero():
    ours, _ = pair()
    plain = Attention.Config(width=24, heads=4).build()
    plain.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        ours.bias_k.zero_()
        ours.bias_v.zero_()
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (plain.q, plain.k, plain.v))
        k, v = (torch.cat([t, torch.zeros(2, 4, 1, 6)], 2) for t in (k, v))
        want = plain.out(((q @ k.mT / 6 ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(ours(x), plain(x), atol=1e-3)
    with pytest.raises(UserError, match="causal"):
        ours(x, causal=True)
