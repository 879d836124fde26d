"""Mamba's essence (Gu & Dao 2023)."""
import math
import time

import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.scan import scan
from polysense.towers.decoding import Beam
from polysense.towers.mamba import Fixed, Mixer
from polysense.train.optim import undecayed

recipe = polysense.load("mamba")


def one_by_one(a, b, state=None):
    h, out = torch.zeros_like(b[:, 0]) if state is None else state, []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        out.append(h)
    return torch.stack(out, 1)


@pytest.fixture(scope="module")
def mamba():
    torch.manual_seed(0)
    return preset_of("mamba").config.build().eval()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50, 256, 300])
def test_the_scan_is_the_recurrence(length):
    torch.manual_seed(length)
    a, b, state = torch.rand(2, length, 3, 4), torch.randn(2, length, 3, 4), torch.randn(2, 3, 4)
    a[:, ::7] = 1e-20                                                    # a step that forgets everything divides nothing by zero
    a, b = a.requires_grad_(), b.requires_grad_()
    for start in (None, state):
        want, got = one_by_one(a, b, start), scan(a, b, start)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(want)
        both = (torch.autograd.grad((h * weight).sum(), (a, b), allow_unused=True, materialize_grads=True) for h in (got, want))
        for x, y in zip(*both):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_reading_at_once_in_pieces_and_word_by_word_agree(mamba):
    text = torch.randint(3, 60, (3, 40))
    whole = mamba.language(text).tokens
    one, states = mamba.language.read(text[:, :23])
    two, states = mamba.language.read(text[:, 23:], states)
    torch.testing.assert_close(torch.cat([one, two], 1), whole, rtol=1e-4, atol=1e-4)
    states, rows = None, []
    for t in range(40):
        row, states = mamba.language.read(text[:, t:t + 1], states)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=1e-4)
    assert [(c.shape, h.shape) for c, h in states] == [((3, 192, 3), (3, 192, 16))] * 2, "what is remembered does not grow"


@torch.no_grad()
def test_a_token_changes_nothing_before_it_and_padding_changes_nothing(mamba):
    text = torch.randint(3, 60, (2, 30))
    other = text.clone()
    other[:, 17] += 1
    a, b = mamba.language(text).tokens, mamba.language(other).tokens
    assert torch.equal(a[:, :17], b[:, :17]) or torch.allclose(a[:, :17], b[:, :17], atol=1e-6)
    assert not torch.allclose(a[:, 17], b[:, 17], atol=1e-4) and not torch.allclose(a[:, -1], b[:, -1], atol=1e-6)
    padded = torch.cat([text, torch.zeros(2, 7, dtype=torch.long)], 1)
    torch.testing.assert_close(mamba.encode_text(padded), mamba.encode_text(text), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_block_is_the_published_one(mamba):
    """Written out for one sequence: projection, causal convolution, SiLU, selective recurrence, gate."""
    m, u = mamba.language.blocks[0].mixer, torch.randn(1, 9, 96)
    x, z = F.linear(u, m.into.weight).chunk(2, -1)
    rows = F.pad(x.mT, (3, 0))
    x = F.silu(torch.stack([(rows[..., t:t + 4] * m.conv.weight[:, 0]).sum(-1) + m.conv.bias for t in range(9)], 1))
    rank = math.ceil(96 / 16)
    low, write, read = F.linear(x, m.select.low.weight).split((rank, 16, 16), -1)
    step = F.softplus(F.linear(low, m.select.step.weight, m.select.step.bias))
    h, out = torch.zeros(192, 16), []
    for t in range(9):
        h = torch.exp(-step[0, t, :, None] * m.decay.exp()) * h + (step[0, t] * x[0, t])[:, None] * write[0, t]
        out.append(h @ read[0, t] + m.through * x[0, t])
    want = F.linear(torch.stack(out)[None] * F.silu(z), m.out.weight)
    torch.testing.assert_close(m(u), want, rtol=1e-4, atol=1e-5)


def test_initial_values(mamba):
    m = preset_of("mamba").config.build().language.blocks[0].mixer
    torch.testing.assert_close(m.decay, torch.arange(1, 17).float().log().expand(192, -1))
    assert torch.equal(m.through, torch.ones(192))
    step = F.softplus(recipe.Mamba.Config(vocab=4, length=4, width=2048, depth=1).build().blocks[0].mixer.select.step.bias).detach()
    assert float(step.min()) > 9e-4 and float(step.max()) < 0.101
    spread = (step.log() - math.log(1e-3)) / math.log(100)
    quantiles = torch.quantile(spread, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.05)


def test_decay_rates_and_the_skip_are_never_shrunk(mamba):
    spared = undecayed(mamba)
    assert {"language.blocks.0.mixer.decay", "language.blocks.0.mixer.through", "language.blocks.0.mixer.select.step.bias"} <= spared
    assert "language.blocks.0.mixer.into.weight" not in spared and "language.embed.weight" not in spared


@torch.no_grad()
def test_without_selection_the_recurrence_is_a_convolution_of_its_input():
    torch.manual_seed(0)
    m = Mixer.Config(width=8, states=4, select=Fixed.Config()).build()
    step, write, read = m.select(torch.zeros(1, 12, 16))
    assert torch.equal(step[:, 0], step[:, 7]) and torch.equal(read[:, 0], read[:, 7])
    impulse = torch.stack([(torch.exp(-step[0, 0, :, None] * m.decay.exp() * k) * step[0, 0, :, None] * write[0, 0] * read[0, 0]).sum(-1)
                           for k in range(12)], -1)                      # [E,12], the kernel of the convolution
    x = torch.randn(1, 12, 16)
    a = torch.exp(step[..., None] * -m.decay.exp())
    y = (scan(a, (step * x)[..., None] * write[:, :, None]) * read[:, :, None]).sum(-1)
    want = torch.stack([sum(impulse[:, k] * x[0, t - k] for k in range(t + 1)) for t in range(12)])
    torch.testing.assert_close(y[0], want, rtol=1e-4, atol=1e-5)
    selective = Mixer.Config(width=8, states=4).build()
    step, _, _ = selective.select(x)
    assert not torch.allclose(step[:, 0], step[:, 7], atol=1e-6), "with it, every token has a step of its own"


@torch.no_grad()
def test_writing_goes_on_from_each_texts_own_end(mamba):
    one, two = torch.randint(3, 60, (1, 9)), torch.randint(3, 60, (1, 14))
    both = torch.cat([F.pad(one, (0, 5)), two])
    alone = [mamba.continue_text(t, max_new=6) for t in (one, two)]
    assert torch.equal(mamba.continue_text(both, max_new=6), torch.cat(alone))
    slow = one
    for _ in range(6):
        slow = torch.cat([slow, mamba.language.logits(mamba.language(slow).tokens[:, -1]).argmax(-1, keepdim=True)], 1)
    assert torch.equal(slow[:, 9:], alone[0])
    assert mamba.continue_text(both, max_new=4, how=Beam.Config(beams=3)).shape == (2, 4)
    with pytest.raises(UserError, match="max_new"):
        mamba.continue_text(one, max_new=0)


@torch.no_grad()
def test_time_grows_with_length_not_with_its_square():
    m = Mixer.Config(width=32, states=8).build()

    def seconds(length: int) -> float:
        u, best = torch.randn(1, length, 32), math.inf
        for _ in range(4):
            start = time.process_time()
            m(u)
            best = min(best, time.process_time() - start)
        return best
    seconds(512)
    assert seconds(8192) / seconds(2048) < 8, "four times the tokens: four times the time, sixteen if it were quadratic"


def test_the_smallest_published_model():
    with torch.device("meta"):
        system = preset_of("mamba", "paper").config.build()
    assert sum(p.numel() for p in system.parameters()) == 129_135_360
    m = system.language.blocks[0].mixer
    assert (m.into.out_features, m.select.step.in_features, m.kernel, m.states) == (3072, 48, 4, 16) and len(system.language.blocks) == 24
