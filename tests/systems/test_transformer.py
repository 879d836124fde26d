"""The Transformer's essence (Vaswani et al. 2017)."""
import math

import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data import source
from polysense.data.scenes import program
from polysense.nn.position import sincos_pairs
from polysense.towers.decoding import Beam, Greedy, SmoothBeam
from polysense.train.schedule import factor

recipe = polysense.load("transformer")
START, END, PAD = 1, 2, 0


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    made = preset_of("transformer").config.build().eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.1)                    # nothing is hidden by a one or a zero
    return made


def texts(*shape: int, seed: int = 0):
    text = torch.randint(4, 500, shape, generator=torch.Generator().manual_seed(seed))
    text[:, 0], text[:, -1] = START, END
    return text


def heads(attn, x, source, seen):
    """Equation 1 in four heads, written out; `seen` [L,S] or [B,1,1,S]."""
    q, k, v = (layer(y).unflatten(-1, (4, 32)).transpose(1, 2) for layer, y in ((attn.q, x), (attn.k, source), (attn.v, source)))
    scores = (q @ k.mT / math.sqrt(32)).masked_fill(~seen, -torch.inf)
    return attn.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def normed(x, norm):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


@torch.no_grad()
def test_encoder_and_decoder_are_the_published_ones(system):
    net, text, other = system.language, texts(2, 11), texts(2, 8, seed=1)
    text[1, 7:] = PAD
    place = lambda n: torch.stack([torch.tensor([f(p / 10000 ** (2 * i / 128)) for i in range(64) for f in (math.sin, math.cos)]) for p in range(n)])
    x, real = net.embed.weight[text] * math.sqrt(128) + place(11), (text != PAD)[:, None, None]
    for b in net.encoder.blocks:
        x = normed(x + heads(b.attn, x, x, real), b.norm1)
        x = normed(x + b.mlp.down(b.mlp.up(x).clamp(min=0)), b.norm2)
    seen = net(text)
    torch.testing.assert_close(seen.tokens, x, rtol=1e-4, atol=1e-4)             # no norm behind the last block
    y, earlier = net.embed.weight[other] * math.sqrt(128) + place(8), torch.ones(8, 8, dtype=torch.bool).tril()
    for b in net.decoder.blocks:
        y = normed(y + heads(b.attn, y, y, earlier), b.norm1)
        y = normed(y + heads(b.cross, y, x, real), b.norm_cross)
        y = normed(y + b.mlp.down(b.mlp.up(y).clamp(min=0)), b.norm2)
    hidden = net.decode(other, seen.tokens, seen.mask)
    torch.testing.assert_close(hidden, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.logits(hidden), y @ net.embed.weight.T, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_later_words_and_padding_change_nothing(system):
    net, text, other = system.language, texts(2, 9), texts(2, 8, seed=1)
    seen = net(text)
    logits = net.logits(net.decode(other, seen.tokens, seen.mask))
    edited = other.clone()
    edited[:, 5:] = 33
    after = net.logits(net.decode(edited, seen.tokens, seen.mask))
    assert torch.equal(logits[:, :5], after[:, :5]) and not torch.allclose(logits[:, 5], after[:, 5], atol=1e-3)
    padded = net(F.pad(text, (0, 4)))
    torch.testing.assert_close(padded.tokens[:, :9], seen.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.logits(net.decode(other, padded.tokens, padded.mask)), logits, rtol=1e-4, atol=1e-4)
    noise = torch.where(padded.mask[..., None], padded.tokens, 99.0)
    torch.testing.assert_close(net.logits(net.decode(other, noise, padded.mask)), logits, rtol=1e-4, atol=1e-4)
    longer = net.logits(net.decode(F.pad(other, (0, 3)), seen.tokens, seen.mask))
    torch.testing.assert_close(longer[:, :8], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(system.encode_text(F.pad(text, (0, 4))), system.encode_text(text), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_writing_word_by_word_is_reading_again_from_the_start(system):
    net, text = system.language, texts(3, 9)
    text[1, 6:] = PAD
    seen = net(text)
    slow = torch.full((3, 1), START)
    for _ in range(7):
        slow = torch.cat([slow, net.logits(net.decode(slow, seen.tokens, seen.mask)[:, -1]).argmax(-1, keepdim=True)], 1)
    assert torch.equal(net.generate(text, max_new=7, end=None), slow[:, 1:])
    cache, whole = net.decoder.cache(3, 8), net.decode(slow, seen.tokens, seen.mask)
    for t in range(8):
        torch.testing.assert_close(net.decode(slow[:, t:t + 1], seen.tokens, seen.mask, cache)[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)


def test_places_shift_by_one_fixed_turn():
    table, k = sincos_pairs(16, 60).double(), 7
    turn = torch.zeros(16, 16, dtype=torch.float64)
    for i in range(8):
        angle = k / 10000 ** (2 * i / 16)
        turn[2 * i:2 * i + 2, 2 * i:2 * i + 2] = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(table[:-k] @ turn.T, table[k:], rtol=0, atol=1e-5)


def test_one_matrix_has_three_roles_and_hears_from_all_of_them(system):
    net, text, other = system.language, texts(2, 9), texts(2, 8, seed=1)
    assert [k for k, v in net.named_parameters() if len(v) == 512 and "mlp" not in k] == ["embed.weight"]

    def loss(source, target, output):
        """The three uses of the matrix as three tensors."""
        place, root = net.place, math.sqrt(128)
        x = net.encoder(F.embedding(text, source) * root + place[:9], mask=text != PAD)
        y = net.decoder(F.embedding(other, target) * root + place[:8], x, source_mask=text != PAD, causal=True)
        return F.cross_entropy((y @ output.T)[:, :-1].flatten(0, 1), other[:, 1:].flatten(), label_smoothing=0.1)

    three = [net.embed.weight.detach().clone().requires_grad_() for _ in range(3)]
    parts = torch.autograd.grad(loss(*three), three)
    whole = system.losses({"question": text, "answer": other})["language"]
    got, = torch.autograd.grad(whole, net.embed.weight)
    torch.testing.assert_close(got, sum(parts), rtol=1e-3, atol=1e-6)
    assert all(float(p.abs().sum()) > 0 for p in parts)


def test_the_target_is_shifted_smoothed_and_padding_is_free(system):
    text, other = texts(2, 9), texts(2, 8, seed=1)
    other[0, 6:] = PAD
    with torch.no_grad():
        seen = system.language(text)
        logits = system.language.logits(system.language.decode(other, seen.tokens, seen.mask))[:, :-1].log_softmax(-1)
        total, count = 0.0, 0
        for b in range(2):
            for t in range(7):
                if (word := int(other[b, t + 1])) != PAD:
                    total, count = total - 0.9 * logits[b, t, word] - 0.1 * logits[b, t].mean(), count + 1
        assert float(system.losses({"question": text, "answer": other})["language"]) == pytest.approx(float(total / count), rel=1e-4)


def test_the_rate_is_that_of_equation_3():
    optim = preset_of("transformer", "paper").stages[0].optim
    assert (optim.name, optim.betas, optim.eps) == ("adam", (0.9, 0.98), 1e-9)
    for n in (1, 17, 2000, 4000, 16_000, 100_000):
        want = 512 ** -0.5 * min(n ** -0.5, n * 4000 ** -1.5)
        assert optim.lr * factor(optim, n - 1, 100_000) == pytest.approx(want, rel=1e-3)


def test_short_texts_are_penalised_as_published():
    beam = SmoothBeam.Config().build()
    assert (beam.c.beams, beam.length(1), beam.length(7)) == (4, 1.0, 2 ** 0.6)
    assert preset_of("transformer", "paper").config.how == SmoothBeam.Config()
    assert Beam.Config(length_penalty=0.6).build().length(7) == 7 ** 0.6


class Table:
    """A `Writer` whose next word depends on the last alone."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, token):
        return self.logits[token]

    def pick(self, rows):
        pass


def test_a_beam_finds_what_greedy_misses_and_length_decides():
    p = torch.full((5, 5), 1e-9)                                         # 0 end, words 1 to 4
    p[1, [2, 3]], p[2, [0, 4]], p[3, 0], p[4, 0] = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5]), 1.0, 1.0
    first, writer = p[1:2].log(), Table(p.log())
    search = lambda how: how.build()(first, writer, max_new=4, end=0, pad=-1)[0].tolist()
    assert search(Greedy.Config())[0] == 2
    assert search(SmoothBeam.Config(length_penalty=0.0)) == [3, 0], "0.4 beats 0.3"
    assert search(SmoothBeam.Config(length_penalty=5.0))[:2] == [2, 4], "long texts are preferred"


@torch.no_grad()
def test_translate_text_searches_with_a_beam_of_four(system):
    text = texts(2, 9)
    beam = system.translate_text(text, max_new=6)
    assert torch.equal(beam, system.language.generate(text, max_new=6, end=END, how=SmoothBeam.Config(beams=4, length_penalty=0.6)))
    assert system.translate_text(text, max_new=6, how=Greedy.Config()).shape[1] <= 6
    with pytest.raises(UserError, match="max_new"):
        system.translate_text(text, max_new=0)
    with pytest.raises(UserError):
        system.translate_text(torch.full((1, 4), 9999), max_new=2)
    with pytest.raises(UserError, match="sinusoids"):
        preset_of("transformer").config.but(**{"language.order": "thirds"}).build()


@torch.no_grad()
def test_without_cross_attention_the_source_is_not_heard():
    torch.manual_seed(0)
    deaf = preset_of("transformer", "alone").config.build().eval()
    assert torch.equal(deaf.translate_text(texts(2, 9), max_new=5), deaf.translate_text(texts(2, 9, seed=5), max_new=5))


def test_published_sizes():
    with torch.device("meta"):
        base, big = (preset_of("transformer", p).config.build() for p in ("paper", "big"))
    assert sum(p.numel() for p in base.parameters()) == recipe.PARAMETERS and len(base.language.encoder.blocks) == 6
    block = big.language.decoder.blocks[0]
    assert (block.attn.heads, block.mlp.up.out_features, block.dropout, big.language.dropout.p) == (16, 4096, 0.3, 0.3)
    assert sum(p.numel() for p in big.parameters()) == pytest.approx(213e6, rel=0.01)


def test_programs_and_sentences_say_the_same():
    scenes = source("scenes:programs")
    assert {"question", "answer", "text"} <= set(scenes.offers)
    seen: dict[str, str] = {}
    for i in range(200):
        (asked, said), (back, written) = scenes.about(i)["qa"]
        assert asked == f"{program.ENGLISH} {written}" and back == f"{program.PROGRAM} {said}"
        assert seen.setdefault(written, said) == said, "one program, one sentence"
    assert len({v: k for k, v in seen.items()}) == len(seen), "one sentence, one program"
    assert len(seen) > 190
