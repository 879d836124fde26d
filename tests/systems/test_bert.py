"""BERT's essence (Devlin et al. 2019) and RoBERTa's (Liu et al. 2019)."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.plan import Feed, PackPlan, PairPlan
from polysense.data.loader import Loader
from polysense.data.sources import ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.mechanisms.word_mask import StaticWordMask, WordMask
from polysense.nn.attention import Attention
from polysense.towers.roberta import counted
from polysense.train.schedule import factor

recipe = polysense.load("bert")
PAD, CLS, SEP, MASK = 0, 1, 2, 4


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return preset_of("bert").config.build().eval()


@pytest.fixture(scope="module")
def roberta():
    torch.manual_seed(0)
    return preset_of("bert", "tiny_roberta").config.build().eval()


def texts(*shape: int, seed: int = 0):
    text = torch.randint(5, 2048, shape, generator=torch.Generator().manual_seed(seed))
    text[:, 0], text[:, -1] = CLS, SEP
    return text


@torch.no_grad()
def test_the_encoder_is_the_published_one(bert):
    """Written out for two texts, one padded: embeddings, norm, post-norm blocks with exact GELU, additive mask, pooler."""
    tower, text, kind = bert.text, texts(2, 9), (torch.arange(9) > 4).long().expand(2, -1)
    text[1, 6:] = PAD
    x = tower.embed.weight[text] + tower.position[0, :9] + tower.kind.weight[kind]
    x = F.layer_norm(x, (128,), tower.norm_pre.weight, tower.norm_pre.bias, 1e-12)
    unseen = (text == PAD)[:, None, None] * -1e9
    for b in tower.body.blocks:
        q, k, v = (layer(x).unflatten(-1, (4, 32)).transpose(1, 2) for layer in (b.attn.q, b.attn.k, b.attn.v))
        mixed = ((q @ k.mT / 32 ** 0.5 + unseen).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = F.layer_norm(x + b.attn.out(mixed), (128,), b.norm1.weight, b.norm1.bias, 1e-12)
        y = b.mlp.up(x)
        y = y * (1 + torch.erf(y / 2 ** 0.5)) / 2
        x = F.layer_norm(x + b.mlp.down(y), (128,), b.norm2.weight, b.norm2.bias, 1e-12)
    seen = tower(text, kind=kind)
    torch.testing.assert_close(seen.tokens[text != PAD], x[text != PAD], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.pooled, torch.tanh(tower.pooler.pre(x[:, 0])), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_says_nothing_and_every_word_is_heard_everywhere(bert, roberta):
    text = texts(2, 12)
    for system in (bert, roberta):
        padded = F.pad(text, (0, 5), value=system.text.pad)
        torch.testing.assert_close(system.text(padded).tokens[:, :12], system.text(text).tokens, rtol=1e-4, atol=1e-5)
        mask = torch.arange(17) < 12
        other = torch.where(mask, padded, 77)                                     # other ids under the padding
        assert torch.equal(system.text(other, mask=mask.expand(2, -1)).tokens[:, :12], system.text(padded).tokens[:, :12])
        for place in (1, 6, 10):
            changed = text.clone()
            changed[:, place] = (changed[:, place] + 7) % 1000 + 5
            moved = (system.text(changed).tokens - system.text(text).tokens).abs().amax(-1)
            assert bool((moved > 1e-5).all()), "every place hears of it, before and behind"


def test_fifteen_of_a_hundred_are_guessed_eight_of_ten_behind_a_mask():
    torch.manual_seed(0)
    for kind in (WordMask, StaticWordMask):
        hide = kind.Config(vocab=2000, mask=MASK, special=(PAD, CLS, SEP)).build()
        text = torch.randint(5, 2000, (2000, 60))
        text[:, 0], text[:, 30], text[:, 50:] = CLS, SEP, PAD
        hidden, chosen = hide(text)
        real = text > 4
        assert not bool((chosen & ~real).any()) and torch.equal(hidden[~chosen], text[~chosen])
        assert float(chosen[real].float().mean()) == pytest.approx(0.15, abs=0.005)
        of = hidden[chosen], text[chosen]
        masked, same = of[0] == MASK, of[0] == of[1]
        assert [float(s.float().mean()) for s in (masked, same, ~masked & ~same)] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_static_masks_return_and_dynamic_ones_do_not():
    text = texts(6, 40)
    for copies in (1, 10):
        static = StaticWordMask.Config(vocab=2048, mask=MASK, special=(PAD, CLS, SEP), copies=copies).build()
        seen = [[static(text)[0][i] for _ in range(60)] for i in range(2)]
        for row in seen:
            assert len({tuple(r.tolist()) for r in row}) == copies
        padded = [static(F.pad(text, (0, 9)))[0][:, :40] for _ in range(40)]
        for i in range(2):
            assert {tuple(p[i].tolist()) for p in padded} <= {tuple(r.tolist()) for r in seen[i]}, "padding changes no mask"
    dynamic = WordMask.Config(vocab=2048, mask=MASK, special=(PAD, CLS, SEP)).build()
    assert len({tuple(dynamic(text)[0][0].tolist()) for _ in range(20)}) == 20
    assert preset_of("bert").config.hide.copies == 10 and type(preset_of("bert", "roberta").config.hide) is WordMask.Config


def test_only_chosen_words_cost(bert):
    text = texts(3, 20)
    torch.manual_seed(1)
    hidden, chosen = bert.hide(text)
    logits = bert.predict(bert.text(hidden, mask=text != PAD).tokens, bert.text.embed.weight)
    want = F.cross_entropy(logits[chosen], text[chosen])
    torch.manual_seed(1)
    batch = {"text": text, "segment": torch.zeros_like(text), "follows": torch.tensor([1, 0, 1])}
    got = bert.losses(batch)
    torch.testing.assert_close(got["words"], want)
    said = bert.follows(bert.text(hidden, mask=text != PAD).pooled)
    torch.testing.assert_close(got["follows"], F.cross_entropy(said, torch.tensor([0, 1, 0])), msg="class 0 is the one that says it follows")
    torch.manual_seed(1)
    assert torch.equal(bert.masked({"text": text})["words"], got["words"])


def test_the_predictor_shares_the_embeddings(bert):
    assert [k for k, v in bert.state_dict().items() if v.shape == (2048, 128)] == ["text.embed.weight"] and "predict.bias" in bert.state_dict()
    text = texts(2, 8)
    seen, hidden = bert.text(text), torch.zeros_like(text, dtype=torch.bool)
    hidden[:, 3] = True
    h = bert.predict.norm(F.gelu(bert.predict.pre(seen.tokens[:, 3])))
    torch.testing.assert_close(bert.guess(seen, hidden), h @ bert.text.embed.weight.T + bert.predict.bias, rtol=1e-4, atol=1e-4)
    bert.zero_grad()
    bert.guess(seen, hidden).sum().backward()
    assert bool((bert.text.embed.weight.grad[1000:1010].abs().sum(1) > 0).all()), "words that nobody said learn as answers"
    bert.zero_grad(set_to_none=True)


def test_what_is_guessed_is_not_read(bert):
    text = texts(2, 10)
    hidden = torch.zeros_like(text, dtype=torch.bool)
    hidden[0, 4] = hidden[1, 2] = hidden[1, 7] = True
    other = text.masked_fill(hidden, 99)
    with torch.no_grad():
        one, two = bert.guess_words(text, hidden), bert.guess_words(other, hidden)
    assert one.shape == (3, 2048) and torch.equal(one, two)
    torch.testing.assert_close(one.sum(-1), torch.ones(3))


def documents(n: int = 30):
    word = lambda d, s: f"{'abcdefghij'[d % 10]}{'klmnopqrst'[d // 10]}{'uvwxyz'[s]}"
    return ListSource("docs", [{"id": str(d), "captions": [" ".join([word(d, s)] * 3) for s in range(4)]} for d in range(n)], ("text",))


def rows_of(plan, keys, steps=12, **more):
    source = documents()
    tokenizer = make_tokenizer(plan, source.captions())
    loader = iter(Loader(source, Feed(text=plan), tokenizer, batch_size=16, seed=3, needs=keys, **more))
    return tokenizer, [next(loader) for _ in range(steps)]


def test_half_of_the_second_sentences_follow_the_first():
    plan = PairPlan(kind="wordpiece", vocab=400, length=32)
    tokenizer, batches = rows_of(plan, ("text", "segment", "follows"), 30)
    follows = torch.cat([b["follows"] for b in batches]).float()
    assert float(follows.mean()) == pytest.approx(0.5, abs=0.08)
    for b in batches[:5]:
        for ids, segment, truth in zip(b["text"], b["segment"], b["follows"]):
            ends = (ids == SEP).nonzero().flatten().tolist()
            assert ids[0] == CLS and len(ends) == 2 and bool((ids[ends[1] + 1:] == PAD).all())
            assert torch.equal(segment.nonzero().flatten(), torch.arange(ends[0] + 1, ends[1] + 1)), "segment 1 is B and its end"
            a, b_ = tokenizer.decode(ids[1:ends[0]]).split()[0], tokenizer.decode(ids[ends[0] + 1:ends[1]]).split()[0]
            assert (a[:2] == b_[:2] and "uvwxyz".index(b_[2]) == "uvwxyz".index(a[2]) + 1) == bool(truth)


def test_a_pair_that_is_too_long_loses_the_end_of_the_longer_sentence():
    plan = PairPlan(kind="wordpiece", vocab=400, length=9)
    _, batches = rows_of(plan, ("text", "segment", "follows"), 4)
    for b in batches:
        assert b["text"].shape[1] <= 9 and bool(((b["text"] == SEP).sum(1) == 2).all()) and bool(((b["segment"] == 1).sum(1) >= 3).all())


def test_whole_sentences_fill_a_text_across_documents():
    tokenizer, batches = rows_of(PackPlan(vocab=400, length=40, pad="zero"), ("text",), 4)
    texts_ = [row for b in batches for row in b["text"]]
    source = documents()
    length = {t: len(tokenizer([t])[0]) - 2 for t in source.captions()}
    for row in texts_:
        row = row[row != tokenizer.pad]
        assert row[0] == tokenizer.start and row[-1] == tokenizer.end and len(row) <= 40
        parts, part = [], []
        for i in row[1:].tolist():
            if i == tokenizer.end:
                parts.append(tokenizer.decode(part).split())
                part = []
            else:
                part.append(i)
        words = [p[k] for p in parts for k in range(0, len(p), 3)]
        assert all(p[k] == p[k + 1] == p[k + 2] for p in parts for k in range(0, len(p), 3)), "no sentence is cut"
        assert all(len({w[:2] for w in p}) == 1 for p in parts), "an end token stands between documents"
        assert len(words) >= 3 and len(row) + max(length.values()) > 39, "as many as fit"
    assert any(len({w[:2] for w in tokenizer.decode([i for i in row.tolist() if i != tokenizer.end]).split()}) > 1 for row in texts_)


def test_roberta_counts_positions_from_two_and_has_neither_segments_nor_the_next_sentence(roberta):
    assert counted(torch.tensor([[40, 41, 1]]), 1).tolist() == [[2, 3, 1]]
    config = preset_of("bert", "roberta").config
    with torch.device("meta"):
        tower = config.text.but(pooler=recipe.TanhHead.Config(into=768, hidden=768)).build()
    assert tower.position.shape[1] == 514 and sum(p.numel() for p in tower.parameters()) == 124_645_632
    assert config.follows is None and config.text.kinds == 1 and type(preset_of("bert", "roberta").feed.text) is PackPlan
    with pytest.raises(UserError, match="roberta"):
        roberta.losses({"text": texts(2, 5), "segment": torch.zeros(2, 5, dtype=torch.long), "follows": torch.ones(2, dtype=torch.long)})
    row = roberta.text.position[0]
    assert torch.equal(roberta.text.places(torch.tensor([[9, 9, 0]]), 0)[0], row[[1, 2, 0]]), "tiny pads with 0"


@torch.no_grad()
def test_features_of_a_text_and_the_split_of_layers(bert):
    text = F.pad(texts(2, 9), (0, 3))
    seen = bert.text(text)
    mean = seen.tokens[:, :9].mean(1)
    for pool, want in (("mean", mean), ("cls", seen.tokens[:, 0]), ("pooler", seen.pooled)):
        other = preset_of("bert").config.but(pool=pool).build().eval()
        other.load_state_dict(bert.state_dict())
        torch.testing.assert_close(other.encode_text(text), F.normalize(want, dim=-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(bert.text.pooled(text), bert.text(text, short=True).pooled)
    body, mask = bert.text.body, text != PAD
    x = bert.text.norm_pre(bert.text.embed(text) + bert.text.position[:, :12] + bert.text.kind.weight[0])
    first = body.layers(x, mask=mask, stop=2)[-1]
    torch.testing.assert_close(body.layers(first, mask=mask, start=2)[-1], seen.tokens, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="pooler"):
        preset_of("bert", "tiny_roberta").config.but(pool="pooler").build()


@torch.no_grad()
def test_the_upper_half_may_read_another_source():
    block = recipe.body(32, 1, 2).block
    tower = preset_of("bert").config.text.but(**{"body.width": 32, "body.heads": 2, "body.block": (block, block, *(block.but(
        cross=Attention.Config(source=24)),) * 2), "pooler": None}).build().eval()
    text, source = texts(2, 7), torch.randn(2, 5, 24)
    plain, reads = tower(text).tokens, tower(text, source=source).tokens
    assert not torch.allclose(plain, reads, atol=1e-4)
    mask = torch.arange(5) < 3
    other = torch.where(mask[:, None], source, 9.0)
    torch.testing.assert_close(tower(text, source=other, source_mask=mask.expand(2, -1)).tokens, tower(text, source=source, source_mask=mask.expand(
        2, -1)).tokens)


def test_published_sizes():
    for name, tower, whole in (("paper", 109_482_240, 110_106_428), ("large", 335_141_888, 336_226_108)):
        with torch.device("meta"):
            system = preset_of("bert", name).config.build()
        assert (sum(p.numel() for p in system.text.parameters()), sum(p.numel() for p in system.parameters())) == (tower, whole)
    first, last = preset_of("bert", "paper_128"), preset_of("bert", "paper")
    assert (first.feed.text.length, last.feed.text.length) == (128, 512) and last.starts[0].preset == "paper_128"
    assert first.stages[0].steps == 9 * last.stages[0].steps == 900_000 and first.config == last.config
    one, two = first.stages[0].optim, last.stages[0].optim
    assert one.lr * factor(one, 900_000, 900_000) == pytest.approx(two.lr * factor(two, 0, 100_000)) == 1e-5, "one fall over a million steps"


def test_a_file_without_a_predictor_says_so(bert):
    alone = preset_of("bert").config.but(predict=None).build()
    with pytest.raises(UserError, match="predictor"):
        alone.guess_words(texts(1, 5), torch.ones(1, 5, dtype=torch.bool))
