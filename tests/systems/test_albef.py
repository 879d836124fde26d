"""ALBEF's essence (Li et al. 2021)."""
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.nn.block import PreNorm
from polysense.nn.norm import LayerNorm
from polysense.nn.transformer import Transformer
from polysense.objectives.distil import distilled_contrast
from polysense.towers.vit import ViT

recipe = polysense.load("albef")


def small(answer: bool = True):
    norm = LayerNorm.Config(eps=1e-6)
    vision = ViT.Config(image_size=64, patch=16, body=Transformer.Config(width=32, depth=1, heads=2, norm=norm, block=PreNorm.Config(norm=norm)))
    made = recipe.config(vision, recipe.bert(64, 16, 32, 2, 2), 2, 16, mask=4, special=(0, 1, 2), queue=10, ramp=4)
    return recipe.answering(made) if answer else made


@pytest.fixture()
def albef():
    torch.manual_seed(0)
    return small().build()


@pytest.fixture(scope="module")
def batch():
    made = fake_batch(preset_of("albef"), ("image", "text", "question", "answer"), n=4)
    made["text"][0, 5:] = torch.tensor([2, 0, 0])
    return made


def after(system, losses, step=1):
    system.after_step(After(step, 0.1, None, losses.keep))


def test_fusion_takes_the_states_of_the_text_tower_and_embeds_nothing_again(albef, batch):
    seen = []
    albef.fusion.register_forward_hook(lambda m, args, out: seen.append(args))
    calls = []
    albef.text.embed.register_forward_hook(lambda *_: calls.append(1))
    albef.match_text(batch["image"], batch["text"])
    assert len(calls) == 1, "the text is embedded once"
    said, image = seen[0]
    torch.testing.assert_close(said, albef.text(batch["text"]).tokens)
    torch.testing.assert_close(image, albef.vision(batch["image"]).tokens, msg="all image tokens are read, not the pooled one")


def test_every_fusion_block_reads_the_image_and_no_text_block_does(albef):
    assert all(b.cross is not None for b in albef.fusion.blocks) and all(b.cross is None for b in albef.text.body.blocks)
    paper = preset_of("albef", "paper").config
    assert (paper.text.body.depth, paper.fusion.depth) == (6, 6) and paper.fusion.block.cross.source == 768
    assert paper.text.body.norm is None and paper.fusion.norm is None


def test_text_tower_then_fusion_without_cross_attention_is_one_bert(albef, batch):
    """Layers 0 to 5, then 6 to 11: the cut leaves no trace."""
    whole = recipe.bert(64, 16, 32, 4, 2).build().eval()
    state = {k: v for k, v in albef.text.state_dict().items()}
    for name, value in albef.fusion.state_dict().items():
        if "cross" not in name:
            _, number, rest = name.split(".", 2)
            state[f"body.blocks.{int(number) + 2}.{rest}"] = value
    whole.load_state_dict(state)
    said = albef.eval().text(batch["text"])
    torch.testing.assert_close(albef.fusion(said.tokens, None, mask=said.mask), whole(batch["text"]).tokens)


def test_three_losses_and_what_each_trains(albef, batch):
    losses = albef.pretrain(batch)
    assert list(losses) == ["contrast", "match", "words"]
    for name, without in (("contrast", ("fusion", "match_head", "words")), ("match", ("image_head", "text_head", "words")),
                          ("words", ("image_head", "text_head", "match_head"))):
        albef.zero_grad(set_to_none=True)
        losses[name].backward(retain_graph=True)
        reached = {n.split(".")[0] for n, p in albef.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert {"vision", "text"} <= reached and not reached & set(without), (name, reached)


def test_matching_reads_true_pairs_hard_pictures_and_hard_texts_of_the_network_itself(albef, batch):
    """Negatives are the online image tokens, with gradient, not the teacher's; three pairs for each of the batch."""
    calls = []
    albef.fusion.register_forward_hook(lambda m, args, out: calls.append((*args, out)))
    losses = albef.pretrain(batch)
    (said, image, fused), = [c for c in calls if len(c[0]) == 12]
    tokens, states = albef.vision(batch["image"]).tokens, albef.text(batch["text"]).tokens
    which = lambda rows, of: [next(i for i, one in enumerate(of) if torch.allclose(one, row, atol=1e-5)) for row in rows]
    pictures, texts, own = which(image, tokens), which(said, states), [0, 1, 2, 3]
    assert pictures[:4] == texts[:4] == texts[4:8] == pictures[8:] == own
    assert all(a != b for a, b in zip(pictures[4:8] + texts[8:], own + own, strict=True))
    truth = torch.tensor([1] * 4 + [0] * 8)
    torch.testing.assert_close(losses["match"], F.cross_entropy(albef.match_head(fused[:, 0]), truth))
    image.retain_grad()
    losses["match"].backward()
    assert image.grad is not None and (image.grad[4:8].flatten(1).abs().sum(1) > 0).all()


def test_contrast_is_against_momentum_features_of_batch_and_queues(albef, batch):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in albef.teacher.module.buffers():
            p.add_(0.02 * torch.randn_like(p)) if p.is_floating_point() else None
        albef.ramp.fill_(0.5)
    twin, alpha = albef.teacher.module, 0.4 * 0.5
    unit = lambda head, x: F.normalize(head(x), dim=-1)
    i_m, t_m = unit(twin["image_head"], twin["vision"](batch["image"]).pooled), unit(twin["text_head"], twin["text"](batch["text"]).pooled)
    i, t = albef.encode_image(batch["image"]), albef.encode_text(batch["text"])
    texts, images = torch.cat([t_m, albef.text_queue.keys]), torch.cat([i_m, albef.image_queue.keys])
    want = (distilled_contrast(i, texts, i_m, 1 / 0.07, alpha) + distilled_contrast(t, images, t_m, 1 / 0.07, alpha)) / 2
    torch.testing.assert_close(albef.pretrain(batch)["contrast"], want, rtol=1e-4, atol=1e-5)


def test_words_are_guessed_from_the_picture_too(albef, batch):
    albef.eval()
    other = {**batch, "image": torch.randn_like(batch["image"])}
    text = batch["text"]
    chosen = torch.zeros_like(text, dtype=torch.bool)
    chosen[1, 3] = chosen[2, 5] = True
    one, two = (albef.guess(albef.whole, albef.vision(b["image"]).tokens, text, chosen) for b in (batch, other))
    assert one.shape == (2, 64) and ((one - two).abs().amax(1) > 1e-4).all()


def test_hidden_words_are_those_the_network_is_asked_for(albef, batch, monkeypatch):
    asked, guess = [], type(albef).guess

    def listening(self, net, image, text, chosen):
        asked.append((text, chosen))
        return guess(self, net, image, text, chosen)
    monkeypatch.setattr(type(albef), "guess", listening)
    torch.manual_seed(5)
    albef.pretrain(batch)
    (one, first), (two, second) = asked
    assert torch.equal(one, two) and torch.equal(first, second), "teacher and student guess the same words"
    assert torch.equal(one[~first], batch["text"][~first]) and first.any() and not first[:, 0].any()


def test_teacher_follows_exactly_and_has_no_gradient(albef, batch):
    losses = albef.pretrain(batch)
    losses.total().backward()
    assert not any("teacher" in n or "queue" in n for n, _ in albef.named_parameters())
    assert all(b.grad is None for b in albef.teacher.buffers())
    before = {k: v.clone() for k, v in albef.teacher.module.state_dict().items()}
    with torch.no_grad():
        for p in albef.parameters():
            p.add_(0.1 * torch.randn_like(p))
    after(albef, losses)
    now, m = albef.teacher.module.state_dict(), 0.995
    for name, value in torch.nn.ModuleDict(albef.whole).named_parameters():
        torch.testing.assert_close(now[name], m * before[name] + (1 - m) * value.detach(), rtol=1e-5, atol=1e-7)
    assert not any(n.startswith("match_head") for n in now), "the matching head has no twin"


def test_the_first_momentum_features_are_those_of_the_network_itself(albef, batch):
    albef.eval()
    keys = albef.pretrain(batch).keep
    torch.testing.assert_close(keys["image_key"], albef.encode_image(batch["image"]).detach())


def test_queues_advance_by_the_batch_wrap_and_hold_unit_keys(albef, batch):
    losses = albef.pretrain(batch)
    for step in range(1, 4):
        after(albef, losses, step)
        assert albef.image_queue.pointer == (4 * step) % 10 == albef.text_queue.pointer
    torch.testing.assert_close(albef.image_queue.keys.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(albef.text_queue.keys[:2], losses.keep["text_key"][2:])
    assert albef.image_queue.keys.requires_grad is False


def test_alpha_climbs_for_an_epoch_then_stays(albef, batch):
    losses, seen = albef.pretrain(batch), []
    for step in (1, 2, 4, 9):
        after(albef, losses, step)
        seen.append(float(albef.alpha * albef.ramp))
    assert seen == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert preset_of("albef", "paper").config.alpha == 0.4 and preset_of("albef", "paper").config.teacher.momentum == 0.995


def test_temperature_stays_in_its_bounds(albef, batch):
    losses = albef.pretrain(batch)
    for value, want in ((-3.0, 0.001), (9.0, 0.5), (0.07, 0.07)):
        albef.temperature.data.fill_(value)
        after(albef, losses)
        assert albef.temperature.item() == pytest.approx(want)


def test_loaded_weights_reach_the_teacher(albef):
    with torch.no_grad():
        albef.vision.cls.add_(1.0)
    albef.after_start()
    assert torch.equal(albef.teacher.module["vision"].cls, albef.vision.cls)


def test_a_pair_is_judged_alike_alone_and_in_a_row(albef, batch):
    albef.eval()
    image, text = batch["image"], batch["text"]
    with torch.inference_mode():
        chance = albef.match_text(image, text)
        assert chance.shape == (4,) and ((chance > 0) & (chance < 1)).all()
        torch.testing.assert_close(albef.match_text(image[:1], text)[0], chance[0])
        torch.testing.assert_close(albef.match_text(image, text[:1]), torch.cat([albef.match_text(image[i:i + 1], text[:1]) for i in range(4)]))
    with pytest.raises(UserError, match="cannot be paired"):
        albef.match_text(image[:2], text[:3])
    with pytest.raises(UserError, match="channels"):
        albef.match_text(image[:, :1], text)


def test_padding_changes_no_judgement(albef, batch):
    albef.eval()
    longer = F.pad(batch["text"], (0, 3))
    torch.testing.assert_close(albef.match_text(batch["image"], batch["text"]), albef.match_text(batch["image"], longer))


def test_grounding_is_gradcam_on_one_cross_attention(albef, batch):
    """Against hooks and autograd on the whole network."""
    albef.eval()
    image, text = batch["image"][:2], batch["text"][:2]
    with torch.inference_mode():
        got = albef.ground_text(image, text)
    assert got.shape == (2, 4, 4) and float(got.amax()) == pytest.approx(1.0) and float(got.min()) >= 0
    said, seen, (block, last) = albef.text(text), albef.vision(image).tokens, albef.fusion.blocks
    x = said.tokens
    x = block.norm1(x + block.attn(x, mask=said.mask))
    q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f, y in ((block.cross.q, x), (block.cross.k, seen), (block.cross.v, seen)))
    weights = (q @ k.mT / 4.0).softmax(-1)
    weights.retain_grad()
    x = block.norm_cross(x + block.cross.out((weights @ v).transpose(1, 2).flatten(2)))
    logits = albef.match_head(last(block.norm2(x + block.mlp(x)), seen, mask=said.mask)[:, 0])
    torch.testing.assert_close(logits.softmax(1)[:, 1], albef.match_text(image, text), msg="the same function")
    logits[:, 1].sum().backward()
    cam = (weights * weights.grad.clamp(min=0)).mean(1)
    for row, words in ((0, slice(1, 5)), (1, slice(1, 7))):
        heat = cam[row, words, 1:].mean(0).reshape(4, 4)
        torch.testing.assert_close(got[row], heat / heat.max(), rtol=1e-3, atol=1e-4)


def test_the_answer_decoder_starts_as_the_fusion_encoder(albef, batch):
    losses = albef.pretrain(batch)
    with torch.no_grad():
        for p in albef.fusion.parameters():
            p.add_(0.1)
    after(albef, losses)
    for name, value in albef.answer.text.body.state_dict().items():
        assert torch.equal(value, albef.fusion.state_dict()[name])
    before = deepcopy(albef.answer.state_dict())
    after(albef, albef.reply(batch), 2)
    assert all(torch.equal(v, before[k]) for k, v in albef.answer.state_dict().items()), "once it trains itself it is left alone"


def test_the_answer_sees_no_later_word_and_reads_the_fused_question(albef, batch):
    albef.eval()
    source, mask = albef.read_question(batch["image"], batch["question"])
    text = batch["answer"]
    whole = albef.answer(text, source, mask)
    torch.testing.assert_close(albef.answer(text[:, :3], source, mask), whole[:, :3])
    assert (albef.answer(text, source.flip(0), mask) - whole).abs().max() > 1e-4
    torch.testing.assert_close(whole[:, 1], albef.answer(torch.cat([text[:, :2], text[:, 2:] + 1], 1), source, mask)[:, 1])


def test_answers_are_written_with_a_cache_as_without(albef, batch):
    albef.eval()
    got = albef.generate_text(batch["image"], batch["question"], max_new=5)
    source, mask = albef.read_question(batch["image"], batch["question"])
    text = torch.ones(4, 1, dtype=torch.long)
    for _ in range(5):
        text = torch.cat([text, albef.answer(text, source, mask)[:, -1].argmax(-1, keepdim=True)], 1)
    for ours, slow in zip(got, text[:, 1:], strict=True):
        n = int((slow == 2).int().argmax()) + 1 if (slow == 2).any() else 5
        assert torch.equal(ours[:n], slow[:n])


def test_answers_are_ranked_by_their_likelihood_after_a_first_cut(albef, batch):
    albef.eval()
    answers = torch.tensor([[1, 7, 2, 0], [1, 9, 11, 2], [1, 20, 2, 0], [1, 9, 2, 0]])
    full = albef.rank_answers(batch["image"], batch["question"], answers)
    source, mask = albef.read_question(batch["image"], batch["question"])
    for a, length in enumerate((3, 4, 3, 3)):
        text = answers[a:a + 1, :length].expand(4, -1)
        slow = albef.answer(text, source, mask)[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None]).sum((1, 2))
        torch.testing.assert_close(full[:, a], slow.detach(), rtol=1e-4, atol=1e-4)
    cut = albef.rank_answers(batch["image"], batch["question"], answers, most=2)
    assert (cut > -torch.inf).sum(1).tolist() == [2] * 4
    first = albef.answer(torch.ones(4, 1, dtype=torch.long), source, mask)[:, 0].log_softmax(-1)[:, answers[:, 1]]
    for row, kept in zip(first, cut > -torch.inf, strict=True):
        assert row[kept].min() >= row[~kept].max() - 1e-6


def test_paper_changes_no_colours_and_questions_stand_on_its_weights():
    first, second = preset_of("albef", "paper"), preset_of("albef", "paper_vqa")
    view = first.feed.train_image
    assert (view.size, view.scale, view.operations, view.magnitude, view.erase) == (256, (0.2, 1.0), 2, 7.0, 0.0)
    assert not {"color", "contrast", "posterize", "solarize", "solarize_add", "invert"} & set(view.only)
    assert second.feed.train_image.only == view.only and second.feed.train_image.size == 384
    assert {s.preset for s in second.starts} == {"paper"} and {s.into for s in second.starts} >= {"vision", "text", "fusion", "words"}


def test_one_bert_becomes_text_and_fusion_encoder():
    """Its first blocks and its last ones, its words; the cross-attention between is new."""
    from types import SimpleNamespace

    from polysense.train.starts import carry, key_of
    torch.manual_seed(0)
    bert = polysense.load("bert").net(64, 16, 32, 4, 2, mask=4, special=(0, 1, 2), dropout=0.0).build().eval()
    albef, starts = small(answer=False).build().eval(), preset_of("albef", "paper").starts
    before = {k: v.clone() for k, v in albef.fusion.state_dict().items() if "cross" in k}
    for start in starts:
        carry(start, SimpleNamespace(system=bert), albef)
    text = torch.tensor([[1, 7, 9, 11, 2]])
    said = albef.text(text)
    torch.testing.assert_close(albef.fusion(said.tokens, None, mask=said.mask), bert.text(text).tokens, rtol=1e-4, atol=1e-5)
    assert before and all(torch.equal(v, albef.fusion.state_dict()[k]) for k, v in before.items())
    assert torch.equal(albef.words.pre.weight, bert.predict.pre.weight) and len(key_of(preset_of("albef", "paper_vqa"))) == 12


def test_without_a_decoder_it_says_so(batch):
    bare = small(answer=False).build()
    with pytest.raises(UserError, match="no answer decoder"):
        bare.generate_text(batch["image"], batch["question"], max_new=3)


def test_tiny_trains_both_stages_through_the_one_loop(batch):
    from itertools import repeat

    from polysense.train.fit import fit
    preset = preset_of("albef").but(config=small())
    torch.manual_seed(0)
    system = preset.config.build()
    for stage in preset.stages:
        steps = list(fit(system, stage.but(steps=8, **{"optim.warmup": 0, "optim.lr": 3e-3}), repeat(batch)))
        assert steps[-1].total < steps[0].total
    assert system.image_queue.pointer == 32 % 10 and float(system.ramp) == 1


def test_not_a_number_is_refused_before_it_touches_the_weights(albef, batch):
    from polysense.train.fit import Diverged, fit
    bad = {**batch, "image": batch["image"].clone()}
    bad["image"][2, 0, 0, 0] = torch.nan
    before = albef.image_head.weight.clone()
    with pytest.raises((Diverged, UserError)):
        list(fit(albef, preset_of("albef").stages[0].but(steps=1), [bad]))
    assert torch.equal(before, albef.image_head.weight) and albef.image_queue.keys.isfinite().all()
