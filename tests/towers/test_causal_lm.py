"""Language models: padding, prefixes, the cache, decoding strategies, masked losses."""
import pytest
import torch
import torch.nn.functional as F

from polysense.base.errors import UserError
from polysense.objectives.language import IGNORE, labels_of, next_token, token_log_likelihood
from polysense.towers.causal_lm import llama, opt
from polysense.towers.decoding import Beam, Greedy, Nucleus

V = 23
CONFIGS = {"llama": llama(vocab=V, length=40, width=16, depth=2, heads=4, hidden=24, kv_heads=2),
           "opt": opt(vocab=V, length=40, width=16, depth=2, heads=2)}


@pytest.fixture(params=CONFIGS)
def lm(request):
    torch.manual_seed(0)
    out = CONFIGS[request.param].build().eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, std=0.5) if p.ndim > 1 else None
    return out


def padded(rows, side):
    wide = max(map(len, rows))
    text, mask = torch.zeros(len(rows), wide, dtype=torch.long), torch.zeros(len(rows), wide, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(wide - len(row), None) if side == "left" else slice(0, len(row))
        text[i, at], mask[i, at] = torch.tensor(row), True
    return text, mask


ROWS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12]]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_text_alone(lm, side):
    text, mask = padded(ROWS, side)
    tokens, pooled, _ = lm(text, mask)
    for i, row in enumerate(ROWS):
        alone = lm(torch.tensor([row]))
        torch.testing.assert_close(tokens[i][mask[i]], alone.tokens[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled[i], alone.pooled[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", [Greedy.Config(), Beam.Config(beams=3)])
def test_padded_generation_equals_each_text_alone_behind_a_prefix(lm, side, how):
    text, mask = padded(ROWS, side)
    prefix = torch.randn(3, 4, 16)
    x, seen = lm.join(prefix, text, mask)
    got = lm.generate(x, seen, max_new=8, end=2, how=how)
    for i, row in enumerate(ROWS):
        alone = lm.generate(lm.join(prefix[i:i + 1], torch.tensor([row]))[0], max_new=8, end=2, how=how)[0]
        assert got[i, :len(alone)].tolist() == alone.tolist() and (got[i, len(alone):] == 0).all()


@torch.no_grad()
def test_cached_generation_equals_the_full_pass_token_by_token(lm):
    x = lm.embed(torch.tensor([[5, 6, 7]]))
    logits, writer = lm.start(x, room=6)
    text = [5, 6, 7]
    for _ in range(6):
        torch.testing.assert_close(logits[0], lm.logits(lm(torch.tensor([text])).tokens)[0, -1], rtol=1e-4, atol=1e-4)
        text.append(int(logits.argmax()))
        logits = writer(torch.tensor([text[-1]]))


@torch.no_grad()
def test_the_prompt_is_read_once_and_every_token_after_it_alone(lm):
    widths = []
    handle = lm.body.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    lm.generate(torch.randn(2, 7, 16), max_new=5, end=None)
    handle.remove()
    assert widths == [7, 1, 1, 1, 1]


def test_no_token_sees_a_later_one(lm):
    x = torch.randn(1, 6, 16, requires_grad=True)
    lm.read(x)[0, 2, 0].backward()           # one feature: the sum of a layer norm is a constant
    assert (x.grad[0, 3:] == 0).all() and (x.grad[0, :3] != 0).any()


def test_greedy_stops_at_the_end_and_pads():
    class Fixed:
        def __init__(self):
            self.n = 0

        def __call__(self, token):
            self.n += 1
            return F.one_hot(torch.tensor([[4, 2, 5], [5, 6, 2]])[:, self.n], V).float()
    got = Greedy.Config().build()(F.one_hot(torch.tensor([4, 5]), V).float(), Fixed(), max_new=3, end=2, pad=0)
    assert got.tolist() == [[4, 2, 0], [5, 6, 2]]


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    kept = lambda **k: Nucleus.Config(**k).build().chances(p.log())[0]
    torch.testing.assert_close(kept(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]))
    torch.testing.assert_close(kept(top_p=0.01), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(kept(top_p=1.0), p[0])
    torch.testing.assert_close(kept(top_p=1.0, top_k=2), torch.tensor([0.625, 0.375, 0, 0]))
    torch.testing.assert_close(kept(top_p=1.0, temperature=0.5), p[0] ** 2 / (p ** 2).sum())


def test_nucleus_is_seeded(lm):
    draw = lambda seed: lm.generate(torch.ones(2, 3, 16), max_new=10, end=None, how=Nucleus.Config(top_p=1.0, temperature=3.0, seed=seed)).tolist()
    assert draw(1) == draw(1) != draw(2)


@torch.no_grad()
def test_wide_beam_finds_the_best_text_of_all(lm):
    x, n = torch.randn(1, 3, 16), 3
    got = lm.generate(x, max_new=n, end=None, how=Beam.Config(beams=V * V))[0].tolist()
    every = torch.cartesian_prod(*[torch.arange(V)] * n)
    logits = lm.logits(lm.read(torch.cat([x.expand(len(every), -1, -1), lm.embed(every)], 1)))[:, 2:-1].log_softmax(-1)
    assert got == every[logits.gather(2, every[..., None]).sum((1, 2)).argmax()].tolist()


def test_loss_against_a_slow_twin_and_masks():
    torch.manual_seed(0)
    logits, text = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    counted = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    label = labels_of(text, counted)
    each = [[-logits[b, t - 1].log_softmax(-1)[text[b, t]] for t in range(1, 5) if counted[b, t]] for b in range(2)]
    torch.testing.assert_close(next_token(logits, label), torch.stack(each[0] + each[1]).mean())
    torch.testing.assert_close(token_log_likelihood(logits, label), torch.stack([-torch.stack(e).sum() for e in each]))
    assert (label[~counted] == IGNORE).all()
    assert next_token(logits, label) == next_token(logits, label.masked_fill(torch.eye(2, 5, dtype=torch.bool) & ~counted, IGNORE))


def test_bad_input_is_refused(lm):
    with pytest.raises(UserError, match="masked"):
        next_token(torch.randn(1, 3, V), torch.tensor([[5, IGNORE, IGNORE]]))
    with pytest.raises(UserError, match="answer is empty"):
        token_log_likelihood(torch.randn(2, 3, V), torch.tensor([[5, 6, 7], [5, IGNORE, IGNORE]]))
    with pytest.raises(UserError, match="shape"):
        next_token(torch.randn(1, 3, V), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UserError, match="at most 40"):
        lm.generate(torch.randn(1, 30, 16), max_new=12, end=None)
    with pytest.raises(UserError, match="at least one"):
        lm.generate(torch.randn(1, 3, 16), max_new=0, end=None)
    with pytest.raises(UserError, match="top_p"):
        Nucleus.Config(top_p=0.0).build()
    with pytest.raises(UserError, match="outside"):
        lm(torch.tensor([[V]]))
