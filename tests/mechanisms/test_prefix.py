"""Virtual tokens: baked is made, real tokens as a prefix, positions, masks, templates, nothing of the base moves."""
import pytest
import torch

from polysense.base.errors import UserError
from polysense.mechanisms.prefix import AFTER, Prefix, VirtualTokens, fill_from, virtual_of
from polysense.nn.block import PreNorm
from polysense.nn.transformer import Transformer
from polysense.towers.causal_lm import llama, opt
from polysense.towers.vit import ViT

MAKERS = {"llama": lambda: llama(vocab=40, length=24, width=16, depth=2, heads=4, hidden=24, kv_heads=2), "opt": lambda: opt(
    vocab=40, length=24, width=16, depth=2, heads=4)}


def lm(kind="llama", adapter=None):
    torch.manual_seed(0)
    made = MAKERS[kind]().build().eval()
    if adapter is not None:
        adapter.put(made)
        with torch.no_grad():
            for n, p in made.named_parameters():
                if "virtual" in n or "soft" in n:
                    p.copy_(torch.randn_like(p) * 0.3)
    return made.eval()


TEXT = torch.tensor([[5, 9, 3, 7, 2], [8, 4, 6, 0, 0]])
MASK = TEXT != 0


@pytest.mark.parametrize("c", [VirtualTokens(tokens=3, hidden=6), VirtualTokens(tokens=3, hidden=6, small=5), VirtualTokens(tokens=3, kind="lstm")])
def test_baked_virtual_tokens_say_what_those_in_training_say(c):
    made = lm(adapter=c)
    out = made(TEXT, MASK).tokens
    virtual_of(made).bake()
    torch.testing.assert_close(made(TEXT, MASK).tokens, out)
    assert {n.split(".")[1] for n, _ in made.named_parameters() if "virtual" in n or "soft" in n} == {"P"}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_prefix_made_by_reading_real_tokens_is_as_if_they_had_been_read(kind):
    plain, made = lm(kind), lm(kind, VirtualTokens(tokens=3))
    first, rest = torch.tensor([[11, 12, 13]]), TEXT[:1]
    cache = plain.body.cache(1, 3)
    plain._through(plain.embed(first), torch.arange(3), None, cache)
    fill_from(made, torch.stack([c.k[0] for c in cache.layers]), torch.stack([c.v[0] for c in cache.layers]))
    torch.testing.assert_close(made(rest).tokens, plain(torch.cat([first, rest], 1)).tokens[:, 3:])


@pytest.mark.parametrize("kind", MAKERS)
def test_a_prompt_that_is_the_embeddings_of_words_is_as_if_they_stood_there(kind):
    plain, made = lm(kind), lm(kind)
    VirtualTokens(tokens=3, kind="prompt", like=(11, 12, 13)).put(made)
    torch.testing.assert_close(made(TEXT[:1]).tokens, plain(torch.cat([torch.tensor([[11, 12, 13]]), TEXT[:1]], 1)).tokens[:, 3:])


@pytest.mark.parametrize(("at", "where"), [((0, 1, 1), [11, 5, 12, 13, 9, 3]), ((AFTER, AFTER, AFTER), [5, 9, 3, 11, 12, 13]),
                                           ((0, AFTER, AFTER), [11, 5, 9, 3, 12, 13])])
def test_a_template_puts_them_before_inside_and_after_each_text(at, where):
    plain, made = lm(), lm()
    VirtualTokens(tokens=3, kind="prompt", like=(11, 12, 13), at=at).put(made)
    text = torch.tensor([[5, 9, 3, 0], [8, 0, 0, 0]])
    out = made(text, text != 0).tokens
    whole = plain(torch.tensor([where])).tokens
    real = [i for i, w in enumerate(where) if w in (5, 9, 3)]
    torch.testing.assert_close(out[0, :3], whole[0, real])
    short = [w for w in where if w not in (9, 3)]
    short = [8 if w == 5 else w for w in short]
    torch.testing.assert_close(out[1, :1], plain(torch.tensor([short])).tokens[:1, [short.index(8)]][0])


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("c", [VirtualTokens(tokens=3), VirtualTokens(tokens=2, kind="prompt"),
                               VirtualTokens(tokens=2, kind="prompt", at=(0, AFTER))])
def test_a_padded_batch_is_its_texts_alone_and_generation_goes_on_from_the_same(kind, c):
    made = lm(kind, c)
    both, alone = made(TEXT, MASK).tokens, made(TEXT[1:, :3]).tokens
    torch.testing.assert_close(both[1:, :3], alone, atol=1e-5, rtol=1e-5)
    if c.at:
        return
    new = made.generate(made.embed(TEXT), MASK, max_new=3, end=None)
    for row, n in ((0, 5), (1, 3)):
        text = TEXT[row:row + 1, :n]
        for i in range(3):
            token = made.logits(made(text).tokens[:, -1]).argmax(-1)
            assert token == new[row, i]
            text = torch.cat([text, token[:, None]], 1)


def test_none_at_all_is_the_base():
    for kind in ("prefix", "prompt"):
        made = lm()
        VirtualTokens(tokens=0, kind=kind).put(made)
        assert torch.equal(made(TEXT, MASK).tokens, lm()(TEXT, MASK).tokens)


def test_what_trains_is_m_2_l_d_and_the_base_stays_bit_for_bit():
    c = VirtualTokens(tokens=5)
    made = lm(adapter=c)
    chosen = c.trainable(made)
    assert sum(p.numel() for n, p in made.named_parameters() if n in chosen) == 5 * 2 * 2 * 8
    before = {k: v.clone() for k, v in made.state_dict().items()}
    for n, p in made.named_parameters():
        p.requires_grad_(n in chosen)
    opt_ = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
    made(TEXT, MASK).tokens.square().sum().backward()
    opt_.step()
    moved = {k for k, v in made.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(chosen) == {"virtual.P"}


def test_each_layer_has_its_own_and_only_the_tower_that_is_named():
    body = Transformer.Config(width=16, depth=3, heads=2, block=PreNorm.Config())
    torch.manual_seed(0)
    tower = ViT.Config(image_size=8, patch=4, body=body).build().eval()
    image = torch.randn(2, 3, 8, 8)
    plain = tower(image).pooled
    VirtualTokens(tokens=2, on="body").put(tower)
    prefix = virtual_of(tower)
    assert isinstance(prefix, Prefix) and prefix.layers == 3
    outs = []
    for i in range(3):
        with torch.no_grad():
            prefix.P.zero_()
            prefix.P[:, i] = 1.0
        outs.append(tower(image).pooled)
    assert all(not torch.allclose(a, b) for a, b in zip(outs, [outs[1], outs[2], plain]))
    torch.testing.assert_close(tower.pooled(image), outs[-1])


def test_files_hold_the_baked_prefix():
    c = VirtualTokens(tokens=3, hidden=6)
    made, twin = lm(adapter=c), lm(adapter=c)
    with torch.no_grad():
        virtual_of(twin).small.add_(1.0)
    c.load(twin, c.tensors(made))
    torch.testing.assert_close(twin(TEXT, MASK).tokens, made(TEXT, MASK).tokens)
    assert c.tensors(made)["prompt_embeddings"].shape == (3, 2 * 2 * 8) and c.about(made)["num_layers"] == 2


@pytest.mark.parametrize(("make", "wrong"), [
    (lambda: VirtualTokens(kind="soft").put(lm()), "kind"), (lambda: VirtualTokens(on="vision").put(lm()), "names no tower"),
    (lambda: VirtualTokens(kind="prompt", on="vision").put(lm()), "0 language models"),
    (lambda: VirtualTokens(tokens=2, at=(1,), kind="prompt").put(lm()), "at"),
    (lambda: VirtualTokens(kind="prompt", like=(99,)).put(lm()), "below 40"), (lambda: virtual_of(lm()), "no virtual tokens"),
    (lambda: VirtualTokens().put(lm(adapter=VirtualTokens())), "already"), (lambda: VirtualTokens().settle(lm()), "cannot be merged"),
    (lambda: VirtualTokens(tokens=2).load(lm(adapter=VirtualTokens(tokens=2)), {"prompt_embeddings": torch.zeros(3, 32)}), r"is \(3, 32\)"),
    (lambda: lm(adapter=VirtualTokens(tokens=22))(TEXT), "reads at most 24")])
def test_what_cannot_be_is_said(make, wrong):
    with pytest.raises(UserError, match=wrong):
        make()
