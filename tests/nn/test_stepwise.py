"""One token at a time with weights laid out for it: the same numbers, never from stale copies, and only where the parts are plain."""
import pytest
import torch
from torch import nn

from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.maps import mixing
from polysense.nn.stepwise import plain
from polysense.nn.transformer import Transformer
from polysense.towers.causal_lm import WORTH, CausalLM, llama, opt

V, NEW = 23, 20
CONFIGS = {"llama": llama(vocab=V, length=60, width=16, depth=2, heads=4, hidden=24),
           "grouped": llama(vocab=V, length=60, width=16, depth=2, heads=4, hidden=24, kv_heads=2),
           "opt": opt(vocab=V, length=60, width=16, depth=2, heads=2)}


def made(kind: str) -> CausalLM:
    torch.manual_seed(0)
    lm = CONFIGS[kind].build().eval()
    for p in lm.parameters():
        nn.init.normal_(p, mean=0.2 if p.ndim < 2 else 0.0, std=0.4)
    return lm


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_the_numbers_are_those_of_the_blocks(kind: str, padded: bool):
    lm, x, mask = made(kind), torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.bool)
    if padded:
        mask[1, :4] = False
    logits, laid = lm.start(x, mask, room=NEW)
    _, usual = lm.start(x, mask, room=NEW)
    assert laid.steps is not None
    usual.steps = None
    for n in range(NEW):
        token = logits.argmax(-1)
        logits, want = laid(token), usual(token)
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
        if n == 5:                           # as beam search does
            for writer in (laid, usual):
                writer.pick(torch.tensor([2, 0, 0]))
            logits = logits[[2, 0, 0]]


def written(lm: CausalLM) -> list[list[int]]:
    torch.manual_seed(1)
    return lm.generate(torch.randn(2, 5, 16), max_new=NEW, end=None).tolist()


def test_copies_are_kept_and_never_stale():
    lm = made("llama")
    with torch.no_grad():
        first, other = lm.stepwise(), lm.start(torch.randn(1, 3, 16), room=WORTH)[1].steps
    assert first is other and lm.start(torch.randn(1, 3, 16).detach(), room=WORTH - 1)[1].steps is None
    before, optimizer = written(lm), torch.optim.AdamW(lm.parameters(), lr=0.3, fused=True)
    lm.read(torch.randn(1, 4, 16)).square().sum().backward()
    optimizer.step()
    trained = written(lm)
    fresh = made("llama")
    fresh.load_state_dict(lm.state_dict())
    assert trained == written(fresh) != before
    lm.load_state_dict(made("llama").state_dict())
    assert written(lm) == before and not any("step" in name for name in lm.state_dict())


def test_only_plain_parts_are_laid_out():
    assert plain(made("llama").body) and plain(made("opt").body)

    class Other(nn.Linear):
        pass

    def changed(how) -> bool:
        lm = made("llama")
        kept = how(lm.body)
        out = plain(lm.body)
        del kept
        return out

    assert not changed(lambda body: body.train())
    assert not changed(lambda body: body.double())
    assert not changed(lambda body: body.blocks[1].mlp.register_forward_hook(lambda *_: None))
    assert not changed(lambda body: setattr(body.blocks[0].attn, "q", Other(16, 16)))
    lm = made("llama")
    with mixing(lm, lambda name, q, k, v, mask: v):
        assert not plain(lm.body)
    scaled = Transformer.Config(width=16, depth=1, heads=2, block=PreNorm.Config(layer_scale=0.1))
    crossed = Transformer.Config(width=16, depth=1, heads=2, block=PreNorm.Config(cross=Attention.Config()))
    assert not any(plain(c.build().eval()) for c in (scaled, crossed))
