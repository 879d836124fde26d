"""VLMo's essence: one attention, experts by modality, positions in one table, three stages, hard negatives, two modes of the same weights."""
import copy

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.decoders.answers import KnownAnswers
from polysense.decoders.codes import CodeTarget
from polysense.decoders.vq_codec import small_codec
from polysense.mechanisms.word_mask import WholeWordMask
from polysense.nn.multiway import Route
from polysense.nn.relative import PairBias, offsets
from polysense.objectives.matching import matching_pairs
from polysense.objectives.spread import Places
from polysense.systems.selfsup import vlmo
from polysense.towers.multiway import apart_sees, shared_multiway, together

SIZE, GRID, WIDE, HEADS = 32, 4, 32, 2


def small(answer=None):
    target = CodeTarget.Config(codec=small_codec(), size=16, mean=vlmo.MEAN, std=vlmo.STD, codec_mean=vlmo.HALF, codec_std=vlmo.HALF)
    return vlmo.config(shared_multiway(SIZE, 8, WIDE, 3, HEADS, 1, 60, 12, 0.5, 16), target, 6, 2, 4, (0, 1, 2), answer)


@pytest.fixture()
def system():
    torch.manual_seed(0)
    made = small().build().eval()
    with torch.no_grad():
        made.net.body.relative.table.normal_(std=0.5)
    return made


@pytest.fixture()
def batch():
    g = torch.Generator().manual_seed(1)
    text = torch.randint(5, 60, (4, 8), generator=g)
    text[:, 0], text[:, 6], text[:, 7], text[1, 4], text[1, 5:] = 1, 2, 0, 2, 0
    word = torch.arange(8).expand(4, 8) - 1
    word = word.masked_fill(torch.isin(text, torch.tensor([0, 1, 2])), -1)
    return {"image": torch.randn(4, 3, SIZE, SIZE, generator=g), "text": text, "word": word,
            "question": text.flip(0), "answer": torch.tensor([[1, 9, 2], [1, 8, 2], [1, 9, 2], [1, 7, 2]])}


def shaken(system, names):
    """A copy whose parameters with one of these in their names are others."""
    other = copy.deepcopy(system)
    touched = [n for n, p in other.named_parameters() if any(k in n for k in names)]
    with torch.no_grad():
        for n, p in other.named_parameters():
            if n in touched:
                p.add_(torch.randn_like(p))
    assert touched
    return other


@torch.no_grad()
def test_pictures_and_texts_alone_meet_their_own_experts_only(system, batch):
    image, text = batch["image"], batch["text"]
    assert torch.equal(shaken(system, (".text.", ".pair.")).encode_image(image), system.encode_image(image))
    others = (".blocks.0.image.", ".blocks.1.image.", ".blocks.2.image.", ".pair.")
    assert torch.equal(shaken(system, others).encode_text(text), system.encode_text(text))
    for mine in (".image.", ".attn."):
        assert not torch.allclose(shaken(system, (f"blocks.1{mine}",)).encode_image(image), system.encode_image(image))
    match = system.match_text(image, text)
    for used in ("blocks.0.image.", "blocks.1.text.", "blocks.2.pair."):
        assert not torch.allclose(shaken(system, (used,)).match_text(image, text), match), used
    for idle in ("blocks.2.image.", "blocks.2.text."):            # in the last block all tokens of a pair pass VL-FFN
        assert torch.equal(shaken(system, (idle,)).match_text(image, text), match), idle


def test_a_batch_of_pictures_leaves_the_language_experts_without_gradient(system, batch):
    system.train()
    system.pictures(batch)["codes"].backward()
    for name, p in system.named_parameters():
        language = (".text." in name and ".blocks." in name) or ".pair." in name or name.startswith(("net.text.", "words."))
        assert (p.grad is None) == (language or name.startswith(("target", "image_head", "text_head", "fused", "pooler", "match", "log_scale"))), name
    system.zero_grad(set_to_none=True)
    system.texts(batch)["words"].backward()
    assert all(p.grad is None for n, p in system.named_parameters() if ".image." in n or ".pair." in n)
    assert all(b.attn.q.weight.grad is not None for b in system.net.body.blocks)


@torch.no_grad()
def test_without_looks_across_the_pair_pass_is_the_two_single_passes(system, batch):
    image, text, net = batch["image"], batch["text"], system.net
    x, mask, i = net.embed(image, text)
    below = net.body.layers(x, Route(i, text.shape[1], True), together(mask, apart_sees(i, text.shape[1])), stop=2)[-1]
    see = net.body.layers(net.embed(image)[0], Route(i, 0, False), stop=2)[-1]
    y, real, _ = net.embed(text=text)
    say = net.body.layers(y, Route(0, text.shape[1], False), real, stop=2)[-1]
    torch.testing.assert_close(below[:, :i], see, rtol=0, atol=1e-5)
    torch.testing.assert_close(below[:, i:][real], say[real], rtol=0, atol=1e-5)


def slow(net, image, text):
    """The fusion pass of one pair as the authors' code orders it: [text; image], positions looked up pair by pair."""
    body, bias = net.body, net.body.relative
    words, (n, own, all_) = text.shape[0], (1 + GRID * GRID, bias.own, len(bias.table))
    index = torch.empty(words + n, words + n, dtype=torch.long)
    for a in range(words):
        for b in range(words):
            index[a, b] = all_ - 1 if a == b == 0 else all_ - 3 if a == 0 else all_ - 2 if b == 0 else b - a + bias.reach - 2 + own + 2
    index[:words, words:], index[words:, :words], index[words:, words:] = own, own + 1, offsets((GRID, GRID))
    x = torch.cat([net.text(text[None]) + net.kind.weight[0], net.image(image[None]) + net.kind.weight[1]], 1)
    for k, block in enumerate(body.blocks):
        y = block.norm1(x)
        q, key, v = (f(y).view(1, -1, HEADS, WIDE // HEADS).transpose(1, 2) for f in (block.attn.q, block.attn.k, block.attn.v))
        scores = q @ key.mT / (WIDE // HEADS) ** 0.5 + bias.table[index][..., k * HEADS:(k + 1) * HEADS].permute(2, 0, 1)
        heard = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.scale1 * block.attn.out(heard)
        if k == len(body.blocks) - 1:
            x = x + block.scale2 * block.pair(x)
        else:
            x = x + block.scale2 * torch.cat([block.text(x[:, :words]), block.image(x[:, words:])], 1)
    return body.norm(x)


@torch.no_grad()
def test_the_pair_pass_equals_a_slow_one_in_the_authors_order(system, batch):
    got = system.net(batch["image"], batch["text"])
    for row, length in ((0, 7), (1, 5)):                                # without what is padding there
        want = slow(system.net, batch["image"][row], batch["text"][row, :length])
        torch.testing.assert_close(got.text[row:row + 1, :length], want[:, :length], rtol=0, atol=2e-5)
        torch.testing.assert_close(got.image[row:row + 1], want[:, length:], rtol=0, atol=2e-5)


@torch.no_grad()
def test_padding_gets_no_attention(system, batch):
    longer = F.pad(batch["text"], (0, 3), value=0)
    torch.testing.assert_close(system.encode_text(longer), system.encode_text(batch["text"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(system.match_text(batch["image"], longer), system.match_text(batch["image"], batch["text"]), rtol=0, atol=1e-5)


def test_positions_of_all_layers_are_one_parameter_with_two_cross_entries():
    bias = PairBias.Config(grid=(GRID, GRID), reach=16, heads=2, layers=3).build()
    assert [n for n, _ in bias.named_parameters()] == ["table"] and bias.table.shape == ((2 * GRID - 1) ** 2 + 3 + 2 + 32, 6)
    torch.nn.init.normal_(bias.table)
    made = bias(17, 5)
    assert len(made) == 3 and made[0].shape == (1, 2, 22, 22)
    for layer, one in enumerate(made):
        say, see = one[0, :, 17:, :17], one[0, :, :17, 17:]
        assert torch.equal(say, bias.table[bias.own, 2 * layer:2 * layer + 2][:, None, None].expand_as(say))
        assert torch.equal(see, bias.table[bias.own + 1, 2 * layer:2 * layer + 2][:, None, None].expand_as(see))
        assert torch.equal(one[..., 17:, 17:], bias(0, 5)[layer]) and torch.equal(one[..., :17, :17], bias(17, 0)[layer])
    with pytest.raises(UserError, match="reach 16"):
        bias(17, 17)
    assert bias(26, 5)[0].shape[-1] == 31                               # another square of patches is interpolated


def test_the_second_stage_moves_nothing_that_pictures_or_pairs_share():
    preset = preset_of("vlmo")
    assert [s.name for s in preset.stages] == ["pictures", "texts", "pairs", "reply"] and preset.stages[2].weights == (("words", 0.25),)
    torch.manual_seed(0)
    system, stage = preset.config.build(), preset.stages[1]
    before = {k: v.clone() for k, v in system.state_dict().items()}
    system.choose_trainable(stage.trainable)
    system.train()
    optimizer = torch.optim.AdamW([p for p in system.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        system.texts(fake_batch(preset, ("text", "word")))["words"].backward()
        optimizer.step()
        system.after_step(After(1, 0.1, optimizer, {}))
    moved = {k for k, v in system.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("net.text.", "words.")) or (".blocks." in k and ".text." in k) for k in moved)
    assert {f"net.body.blocks.{i}.text.mlp.up.weight" for i in range(4)} <= moved


@torch.no_grad()
def test_three_losses_of_the_third_stage(system, batch, monkeypatch):
    def info(a, b, scale):
        logits = scale * a @ b.T
        return (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2

    asked = {}
    monkeypatch.setattr(vlmo, "matching_pairs", lambda *a: asked.setdefault("pairs", matching_pairs(*a)))
    torch.manual_seed(3)
    hidden, chosen = system.hide_text(batch["text"].repeat(20, 1), batch["word"].repeat(20, 1))
    row = int(chosen.view(20, 4, -1).any(2).sum(1).argmax()) * 4                     # a draw that hides words of most texts
    hidden, chosen = hidden[row:row + 4], chosen[row:row + 4]
    system.hide_text.forward = lambda text, word: (hidden, chosen)
    losses = system.pairs(batch)
    guessed = system.word_logits(system.net(batch["image"], hidden).text[chosen])
    torch.testing.assert_close(losses["words"], F.cross_entropy(guessed, batch["text"][chosen]), msg="words are guessed with the picture")
    alone = system.word_logits(system.net(text=hidden).text[chosen])
    assert int(chosen.sum()) > 1 and not torch.allclose(guessed, alone, atol=1e-3)
    (i, fi), (t, ft) = system.both_ways(image=batch["image"]), system.both_ways(text=batch["text"])
    torch.testing.assert_close(losses["contrast"], (info(i, t, system.scale) + info(fi, ft, 1 / 0.07)) / 2)
    torch.testing.assert_close(i, system.encode_image(batch["image"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(t, system.encode_text(batch["text"]), rtol=0, atol=1e-5)
    assert not torch.allclose(fi, F.normalize(system.fused_image_head(system.net.pooled(batch["image"])), dim=-1), atol=1e-3), "not by VL-FFN"
    pairs = asked["pairs"]
    assert pairs.truth.tolist() == [1] * 4 + [0] * 8 and bool(((pairs.image == pairs.text) == pairs.truth.bool()).all())
    logits = system.match_head(system.fused(batch["image"][pairs.image], batch["text"][pairs.text]))
    torch.testing.assert_close(losses["match"], F.cross_entropy(logits, pairs.truth))
    torch.testing.assert_close(system.match_text(batch["image"], batch["text"]), logits[:4].softmax(-1)[:, 1])


@torch.no_grad()
def test_hard_negatives_are_looked_for_on_all_ranks(system, batch, monkeypatch):
    """As rank 1 of 2, the other rank's samples before its own."""
    asked, fed = {}, []
    monkeypatch.setattr(vlmo, "places", lambda x: Places((4, 4), 1))
    monkeypatch.setattr(vlmo, "widest", lambda n, device: n + 2)
    monkeypatch.setattr(vlmo, "gather", lambda x, at: torch.cat([x.flip(0), x]))
    monkeypatch.setattr(vlmo, "matching_pairs", lambda *a: asked.setdefault("pairs", matching_pairs(*a)))
    fused = type(system).fused
    monkeypatch.setattr(type(system), "fused", lambda self, image, text: fed.append((image, text)) or fused(self, image, text))
    system.pairs(batch)
    pairs, (images, texts) = asked["pairs"], fed[0]
    assert pairs.image[:4].tolist() == pairs.text[:4].tolist() == [4, 5, 6, 7] and bool((pairs.image == pairs.text).eq(pairs.truth.bool()).all())
    assert torch.equal(images[:4], batch["image"]) and torch.equal(texts[:4], F.pad(batch["text"], (0, 2)))
    every = torch.cat([batch["image"].flip(0), batch["image"]])
    assert torch.equal(images, every[pairs.image]) and int(pairs.image.max()) < 8


def test_words_are_hidden_whole():
    mask = WholeWordMask.Config(vocab=60, mask=4, special=(0, 1, 2), share=0.3).build()
    text = torch.randint(5, 60, (400, 9))
    word = torch.tensor([-1, 0, 1, 1, 1, 2, 3, 3, -1]).expand(400, 9)
    hidden, chosen = mask(text, word)
    assert not bool(chosen[:, [0, 8]].any()) and torch.equal(hidden[~chosen], text[~chosen])
    assert torch.equal(chosen[:, 2], chosen[:, 3]) and torch.equal(chosen[:, 3], chosen[:, 4]) and torch.equal(chosen[:, 6], chosen[:, 7])
    assert not torch.equal(chosen[:, 1], chosen[:, 2]) and abs(float(chosen[:, [1, 2, 5, 6]].float().mean()) - 0.3) < 0.05
    assert abs(float((hidden[chosen] == 4).float().mean()) - 0.8) < 0.05


def test_answers_become_known_one_by_one(batch):
    system = small(KnownAnswers.Config(room=3, length=4)).build()
    with pytest.raises(UserError, match="knows no answer"):
        system.generate_text(batch["image"], batch["question"], max_new=3)
    optimizer = torch.optim.Adam(system.parameters(), lr=3e-3)
    for step in range(40):
        losses = system.reply(batch)
        assert float(losses["answer"].detach()) > 0
        optimizer.zero_grad()
        losses["answer"].backward()
        optimizer.step()
        system.after_step(After(step, 0.5, optimizer, losses.keep))
    assert system.answers.words.tolist() == [[1, 9, 2, 0], [1, 8, 2, 0], [1, 7, 2, 0]]
    said = system.eval().generate_text(batch["image"], batch["question"], max_new=8)
    assert said.tolist() == [[9, 2, 0, 0], [8, 2, 0, 0], [9, 2, 0, 0], [7, 2, 0, 0]]
    place, table = system.answers.places(torch.tensor([[1, 33, 2], [1, 8, 2]]))
    assert place.tolist() == [-1, 1] and torch.equal(table, system.answers.words), "there is no room for a fourth"
    with pytest.raises(UserError, match="no head for answers"):
        _ = small().build().answers


def test_a_beit_becomes_attention_and_experts_for_pictures(system, batch):
    from polysense.towers.beit import shared_bias

    tower = shared_bias(SIZE, 8, WIDE, 3, HEADS, 0.5).build().eval()
    torch.nn.init.normal_(tower.body.relative.table)
    before = {k: v.clone() for k, v in system.net.state_dict().items()}
    system.net.load_state_dict(system.net.take_over(tower.state_dict()))
    system.net.kind.weight.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(system.net(batch["image"]).image, tower(batch["image"]).tokens, rtol=0, atol=1e-5)
    assert all(torch.equal(system.net.state_dict()[k], v) for k, v in before.items() if ".text." in k or ".pair." in k)


def test_bad_pairs_are_refused(system, batch):
    with pytest.raises(UserError, match="cannot be paired"):
        system.match_text(batch["image"][:3], batch["text"][:2])
    with pytest.raises(UserError, match="neither a picture nor a text"):
        system.net()
    with pytest.raises(UserError, match="expert for pairs"):
        shared_multiway(SIZE, 8, WIDE, 2, HEADS, 3, 60, 12).build()
