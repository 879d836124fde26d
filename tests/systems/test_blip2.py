"""BLIP-2's essence (Li et al. 2023)."""
from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.connectors.qformer import QFormer
from polysense.towers.seq2seq import flan_t5
from polysense.train.fit import Diverged, fit

recipe = polysense.load("blip2")
SMALL = {"config.vision.body.width": 32, "config.vision.body.depth": 2, "config.vision.body.heads": 2, "config.vision.patch": 16,
         "config.qformer.width": 32, "config.qformer.heads": 2, "config.qformer.queries": 3, "config.qformer.source": 32, "config.qformer.vocab": 65,
         "config.words.vocab": 65, "config.decode": 64, "config.dim": 16, "config.language.vocab": 64, "config.language.body.width": 24,
         "config.language.body.heads": 2, "config.language.body.block.mlp.hidden": 48}


def small():
    return preset_of("blip2").but(**SMALL)


@pytest.fixture()
def blip2():
    torch.manual_seed(0)
    return small().config.build()


@pytest.fixture(scope="module")
def batch():
    made = fake_batch(preset_of("blip2"), ("image", "text"), n=4)
    made["text"][0, 5:] = torch.tensor([2, 0, 0])
    return made


def test_queries_are_bit_identical_under_own_and_causal_and_change_under_all(blip2, batch):
    q, seen, text = blip2.qformer.eval(), blip2.see(batch["image"]), batch["text"]
    own, causal, all_ = (q(seen, text, see=see)[0] for see in ("own", "causal", "all"))
    assert torch.equal(own, causal) and torch.equal(own, q(seen)[0])
    for see in ("own", "causal"):
        assert torch.equal(q(seen, text.flip(1), see=see)[0], own)
    assert (all_ - own).abs().max() > 1e-4 and (q(seen, text.flip(0), see="all")[0] - all_).abs().max() > 1e-4


def masked_twin(q, seen, text, see):
    """The paper's figure 2: one sequence [queries; text], one mask."""
    n, length, real = q.queries, text.shape[1], text != q.pad
    z = torch.cat([q.start(seen), q.words(text)], 1)
    mask = torch.zeros(len(text), n + length, n + length, dtype=torch.bool)
    mask[:, :n, :n] = True
    if see == "all":
        mask[:, :n, n:], mask[:, n:, :n] = real[:, None], True
        mask[:, n:, n:] = real[:, None]
    elif see == "own":
        mask[:, n:, n:] = real[:, None]
    else:
        mask[:, n:, :n] = True
        mask[:, n:, n:] = real[:, None] & torch.ones(length, length, dtype=torch.bool).tril()
    for block in q.blocks:
        z = block.mix(z, mask=mask)
        z = torch.cat([block.ask(z[:, :n], seen), block.say(z[:, n:])], 1)
    return z[:, :n], z[:, n:]


@pytest.mark.parametrize("see", ["own", "causal", "all"])
def test_each_way_to_see_is_its_mask(blip2, batch, see):
    q, seen = blip2.qformer.eval(), blip2.see(batch["image"])
    for ours, theirs in zip(q(seen, batch["text"], see=see), masked_twin(q, seen, batch["text"], see), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="no mask called"):
        q(seen, batch["text"], see="both")


def test_text_alone_never_depends_on_the_picture(blip2, batch):
    q, seen = blip2.qformer.eval(), blip2.see(batch["image"]).detach().requires_grad_()
    assert torch.equal(q(seen, batch["text"])[1], q(torch.zeros_like(seen), batch["text"])[1])
    said = q(seen, batch["text"])[1].sum()
    assert torch.autograd.grad(said, seen, allow_unused=True)[0] is None
    through, = torch.autograd.grad(q(seen, batch["text"], see="causal")[1].sum(), seen)
    assert through.abs().sum() > 0, "through the queries it reads the picture"


def test_a_word_sees_no_later_one_behind_the_queries(blip2, batch):
    q, seen, text = blip2.qformer.eval(), blip2.see(batch["image"]), batch["text"]
    looked = q.look(seen)
    whole = q.say(text, looked)
    torch.testing.assert_close(q.say(text[:, :4], looked), whole[:, :4])
    assert (q.say(text, q.look(seen.flip(0))) - whole).abs().max() > 1e-5


def test_cross_attention_in_every_second_block_of_the_queries_alone():
    with torch.device("meta"):
        q = preset_of("blip2", "paper").config.qformer.build()
    assert [b.cross is not None for b in q.blocks] == [True, False] * 6 and q.queries == 32
    assert q.blocks[0].cross.k.in_features == 1408 and q.blocks[0].attn is not q.blocks[0].cross


def test_queries_have_a_feed_forward_of_their_own_born_as_a_copy():
    q = QFormer.Config(queries=2, width=8, depth=2, heads=2, source=4, vocab=20, length=6).build()
    for block in q.blocks:
        assert block.mlp_query is not block.mlp
        for a, b in zip(block.mlp_query.parameters(), block.mlp.parameters(), strict=True):
            assert torch.equal(a, b)
    bare = QFormer.Config(queries=2, width=8, depth=2, heads=2, source=4).build()
    assert not any("mlp." in n or "norm2" in n or "embed" in n for n, _ in bare.named_parameters())
    with pytest.raises(UserError, match="no text part"):
        bare.say(torch.ones(1, 2, dtype=torch.long))


def test_contrast_takes_the_best_query_with_label_smoothing(blip2, batch):
    blip2.eval()
    queries, words = blip2.query_features(blip2.qformer.look(blip2.see(batch["image"])).query), blip2.text_features(batch["text"])
    similar = torch.stack([torch.stack([max(q @ w for q in queries[i]) for w in words]) for i in range(4)]) / 0.07
    want = (F.cross_entropy(similar, torch.arange(4), label_smoothing=0.1) + F.cross_entropy(similar.T, torch.arange(4), label_smoothing=0.1)) / 2
    torch.testing.assert_close(blip2.align(batch)["contrast"], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(words, F.normalize(blip2.heads.text_head(blip2.qformer(blip2.see(batch["image"]), batch["text"])[1][:, 0]), dim=-1))


def test_match_averages_the_logits_of_all_queries(blip2, batch):
    blip2.eval()
    seen = blip2.see(batch["image"])
    query, _ = blip2.qformer(seen, batch["text"], see="all")
    want = torch.stack([blip2.heads.match_head(query[:, i]) for i in range(3)]).mean(0)
    torch.testing.assert_close(blip2.match_logits(seen, batch["text"]), want)
    chance = blip2.match_text(batch["image"], batch["text"])
    torch.testing.assert_close(chance, want.softmax(1)[:, 1])
    torch.testing.assert_close(blip2.match_text(batch["image"][1:2], batch["text"])[1], chance[1])
    with pytest.raises(UserError, match="cannot be paired"):
        blip2.match_text(batch["image"][:3], batch["text"][:2])


def test_caption_begins_with_dec_and_reuses_the_queries_of_contrast(blip2, batch, monkeypatch):
    blip2.eval()
    begun, looks = [], []
    say, look = QFormer.say, QFormer.look
    monkeypatch.setattr(QFormer, "say", lambda self, text, seen=None: (begun.append(text) if seen is not None else None, say(self, text, seen))[1])
    monkeypatch.setattr(QFormer, "look", lambda self, image: (looks.append(1), look(self, image))[1])
    losses = blip2.align(batch)
    assert len(looks) == 1 and len(begun) == 1
    assert (begun[0][:, 0] == 64).all() and torch.equal(begun[0][:, 1:], batch["text"][:, 1:])
    logits = blip2.heads.words(say(blip2.qformer, begun[0], look(blip2.qformer, blip2.see(batch["image"]))), blip2.qformer.embed.weight)
    label = batch["text"][:, 1:].masked_fill(batch["text"][:, 1:] == 0, -100)
    torch.testing.assert_close(losses["caption"], F.cross_entropy(logits[:, :-1].flatten(0, 1), label.flatten(), label_smoothing=0.1))
    assert list(losses) == ["contrast", "match", "caption"] and not preset_of("blip2", "paper").stages[0].weights


def test_image_tokens_are_those_before_the_last_block_through_a_trained_norm(blip2, batch):
    blip2.eval()
    states = blip2.vision.features(batch["image"])
    torch.testing.assert_close(blip2.see(batch["image"]), blip2.norm_vision(states[-2]))
    assert states[-2].shape[1] == 17, "class token and 16 patches"


def test_both_stages_leave_tower_and_language_model_byte_identical(batch):
    preset = small()
    torch.manual_seed(0)
    system = preset.config.build()
    list(fit(system, preset.stages[0].but(steps=1), repeat(batch)))
    frozen = {k: v.clone() for k, v in system.state_dict().items() if k.startswith(("vision.", "language."))}
    for stage in preset.stages[1:]:
        steps = list(fit(system, stage.but(steps=3, **{"optim.warmup": 0}), repeat(batch)))
        assert len(steps) == 3 and not system.vision.training and not system.language.training
        for name, value in system.state_dict().items():
            assert name not in frozen or torch.equal(value, frozen[name]), name
    assert any(k.startswith("language") for k in frozen)


def test_stage_two_trains_queries_and_projection_alone(blip2, batch):
    stage = small().stages[2]
    blip2.choose_trainable(stage.trainable)
    blip2.speak(batch).total().backward()
    got = {n for n, p in blip2.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(n.startswith(("qformer.", "to_language.", "norm_vision.")) for n in got)
    assert {"qformer.query", "to_language.weight"} <= got
    assert not any(".mlp." in n or "norm2" in n or "embed" in n or "position" in n for n in got), "no text part of the Q-Former"


def test_language_loss_counts_neither_prompt_nor_padding_and_without_queries_is_the_lms_own(blip2, batch):
    blip2.eval()
    text, soft = batch["text"], blip2.soft_prompt(batch["image"])
    language = blip2.language
    real = text != 0
    logits = language.logits(language.read(language.embed(text), real))
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].masked_fill(~real[:, 1:], -100).flatten())
    torch.testing.assert_close(blip2.nll(text, None), own)
    torch.testing.assert_close(blip2.nll(text, soft[:, :0]), own)
    with_prompt = blip2.nll(text, soft)
    assert (with_prompt - own).abs() > 1e-4
    torch.testing.assert_close(blip2.nll(F.pad(text, (0, 3)), soft), with_prompt)
    x = torch.cat([soft, language.embed(text)], 1)
    one = torch.stack([F.cross_entropy(language.logits(language.read(x[i:i + 1, :3 + n]))[0, 3:2 + n], text[i, 1:n], reduction="sum")
                       for i, n in enumerate(real.sum(1).tolist())]).sum() / real[:, 1:].sum()
    torch.testing.assert_close(with_prompt, one)
    blip2.prompt = (7, 8)
    longer = torch.cat([text[:, :1], torch.tensor([[7, 8]]).expand(4, -1), text[:, 1:]], 1)
    x = torch.cat([soft, language.embed(longer)], 1)
    logits = language.logits(language.read(x, torch.cat([torch.ones(4, 3, dtype=torch.bool), longer != 0], 1)))[:, 3:]
    label = longer[:, 1:].masked_fill(longer[:, 1:] == 0, -100)
    label[:, :2] = -100
    torch.testing.assert_close(blip2.nll(text, soft), F.cross_entropy(logits[:, :-1].flatten(0, 1), label.flatten()))


def test_words_are_written_with_a_cache_as_without_and_go_on_from_the_prompt(blip2, batch):
    blip2.eval()
    prompt = torch.tensor([[1, 9, 2], [1, 9, 11], [1, 30, 2], [1, 9, 2]])
    got = blip2.generate_text(batch["image"], prompt, max_new=4)
    soft, language = blip2.soft_prompt(batch["image"]), blip2.language
    for i, n in enumerate((2, 3, 2, 2)):
        text = prompt[i:i + 1, :n]
        for _ in range(4):
            x = torch.cat([soft[i:i + 1], language.embed(text)], 1)
            text = torch.cat([text, language.logits(language.read(x))[:, -1].argmax(-1, keepdim=True)], 1)
        want = text[0, n:]
        stop = int((want == 2).int().argmax()) + 1 if (want == 2).any() else 4
        assert torch.equal(got[i, :stop], want[:stop])


def test_one_stage_says_what_it_lacks(batch):
    first = small().config.but(language=None).build()
    with pytest.raises(UserError, match="no language model"):
        first.generate_text(batch["image"], batch["text"], max_new=2)
    second = small().config.but(dim=0, words=None, **{"qformer.vocab": 0}).build()
    for call in (lambda: second.encode_image(batch["image"]), lambda: second.match_text(batch["image"], batch["text"])):
        with pytest.raises(UserError, match=r"second stage|no text part"):
            call()
    with pytest.raises(UserError, match="first stage is over"):
        small().config.but(words=None).build().align(batch)


def test_not_a_number_is_refused_before_it_touches_the_weights(blip2, batch):
    bad = {**batch, "image": batch["image"].clone()}
    bad["image"][2, 0, 0, 0] = torch.nan
    before = blip2.qformer.query.clone()
    with pytest.raises(Diverged, match="2"):
        list(fit(blip2, small().stages[1].but(steps=1), [bad]))
    assert torch.equal(before, blip2.qformer.query)


def test_parameters_are_those_of_the_paper():
    with torch.device("meta"):
        first, second = (preset_of("blip2", n).config.build() for n in ("paper", "paper_opt"))
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    assert abs(count(first.qformer, first.align_heads) / 188e6 - 1) < 0.01, "section 3.1: 188M in the Q-Former"
    assert abs(count(second.language) / 2.65e9 - 1) < 0.02


@pytest.fixture()
def replier():
    torch.manual_seed(0)
    small = preset_of("blip2", "tiny_t5").but(**{k: v for k, v in SMALL.items() if ".language." not in k})
    return small.but(**{"config.language": flan_t5(vocab=64, width=24, depth=2, heads=2, head_width=8, hidden=32)}).config.build().eval()


@pytest.mark.parametrize("die", [0.0, 0.5, 0.999])
def test_an_encoder_decoder_is_given_the_first_words_and_writes_the_rest(replier, batch, monkeypatch, die):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.full(*shape, die))
    soft, text, lm = replier.soft_prompt(batch["image"]), batch["text"], replier.language
    terms, counted = [], 0
    for row, prefix in zip(text, soft, strict=True):
        words = row[1:][row[1:] != 0]                                     # the end is the last of them
        k = int(die * len(words))
        given, rest = torch.cat([words[:k], torch.tensor([2])]), words[k:]
        x = torch.cat([prefix, lm.embed(given)])[None]
        logits = lm.logits(lm.decode(torch.cat([torch.tensor([0]), rest[:-1]])[None], lm.read(x)))[0]
        terms.append(F.cross_entropy(logits, rest, reduction="sum"))
        counted += len(rest)
    torch.testing.assert_close(replier.speak(batch)["language"], torch.stack(terms).sum() / counted, rtol=1e-4, atol=1e-5)
    padded = {**batch, "text": F.pad(text, (0, 3))}
    torch.testing.assert_close(replier.speak(padded)["language"], replier.speak(batch)["language"])


def test_an_encoder_decoder_replies_to_the_words_of_the_prompt(replier, batch):
    prompt = torch.tensor([[1, 9, 11, 2], [1, 9, 2, 0], [1, 2, 0, 0], [1, 7, 8, 9]])
    got, lm = replier.generate_text(batch["image"], prompt, max_new=4), replier.language
    for i, n in enumerate((2, 1, 0, 3)):
        x = torch.cat([replier.soft_prompt(batch["image"][i:i + 1]), lm.embed(torch.cat([prompt[i, 1:1 + n], torch.tensor([2])]))[None]], 1)
        said = torch.tensor([[0]])
        for _ in range(4):
            said = torch.cat([said, lm.logits(lm.decode(said, lm.read(x)))[:, -1].argmax(-1, keepdim=True)], 1)
        want = said[0, 1:]
        stop = int((want == 2).int().argmax()) + 1 if (want == 2).any() else 4
        assert torch.equal(got[i, :stop], want[:stop])


def test_stage_two_leaves_an_encoder_decoder_as_it_is(replier, batch):
    before = {k: v.clone() for k, v in replier.language.state_dict().items()}
    list(fit(replier, preset_of("blip2", "tiny_t5").stages[2].but(steps=2, **{"optim.warmup": 0}), repeat(batch)))
    assert all(torch.equal(v, before[k]) for k, v in replier.language.state_dict().items())
    replier.choose_trainable(("*",))
    replier.speak(batch).total().backward()
    assert replier.language.encoder_bias.table.grad.abs().sum() > 0 and replier.language.decoder_bias.table.grad.abs().sum() > 0


def test_flan_t5_xl_has_its_published_size():
    with torch.device("meta"):
        system = preset_of("blip2", "paper_t5").config.build()
    assert sum(p.numel() for p in system.language.parameters()) == 2_849_757_184, "google/flan-t5-xl"


def test_matching_reads_true_pairs_hard_pictures_and_hard_texts(blip2, batch, monkeypatch):
    blip2.eval()
    calls, judge = [], type(blip2).match_logits
    monkeypatch.setattr(type(blip2), "match_logits", lambda self, seen, text: (calls.append((seen, text)), judge(self, seen, text))[1])
    losses = blip2.align(batch)
    (seen, text), = calls
    tokens = blip2.see(batch["image"])
    which = lambda rows, of: [next(i for i, one in enumerate(of) if torch.equal(one, row)) for row in rows]
    pictures, texts, own = which(seen, tokens), which(text, batch["text"]), [0, 1, 2, 3]
    assert pictures[:4] == texts[:4] == texts[4:8] == pictures[8:] == own
    assert all(a != b for a, b in zip(pictures[4:8] + texts[8:], own + own, strict=True))
    torch.testing.assert_close(losses["match"], F.cross_entropy(judge(blip2, seen, text), torch.tensor([1] * 4 + [0] * 8)))


def test_a_bert_becomes_the_queries_and_the_text():
    from types import SimpleNamespace

    from polysense.train.starts import carry, key_of
    torch.manual_seed(0)
    bert = polysense.load("bert").net(64, 48, 32, 4, 2, mask=4, special=(0, 1, 2), dropout=0.0).build().eval()
    (start,) = preset_of("blip2", "paper").starts
    system = small().config.build().eval()
    before = {k: v.clone() for k, v in system.qformer.state_dict().items()}
    carry(start, SimpleNamespace(system=bert), system)
    text, q = torch.tensor([[1, 7, 9, 11, 2]]), system.qformer
    with torch.no_grad():
        bert.text.kind.weight.zero_()            # segments are not read here
    torch.testing.assert_close(q.say(text), bert.text(text).tokens, rtol=1e-4, atol=1e-5)
    for block in q.blocks:
        assert torch.equal(block.mlp_query.up.weight, block.mlp.up.weight) and torch.equal(block.norm_query.weight, block.norm2.weight)
    assert all(torch.equal(before[k], v) for k, v in q.state_dict().items() if "cross" in k or k == "query")
    assert torch.equal(q.embed.weight[64:], before["embed.weight"][64:]) and not torch.equal(q.embed.weight[:64], before["embed.weight"][:64])
    assert len(key_of(preset_of("blip2", "paper_opt"))) == 12
