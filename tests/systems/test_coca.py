"""CoCa's essence (Yu et al. 2022): each test fails if its mechanism is replaced by a shortcut."""
import pytest
import torch
import torch.nn.functional as F
from reference import shake

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.objectives.contrastive import info_nce
from polysense.towers.decoding import Beam
from polysense.towers.shapes import plain_vit
from polysense.train.fit import fit
from polysense.train.gradients import backward

recipe = polysense.load("coca")
FORMS = {"cascade": lambda: recipe.config(plain_vit(32, 8, 24, 2, 2), (32, 2, 2), 5, 60, 12),
         "parallel": lambda: recipe.config(plain_vit(32, 8, 24, 2, 2), (32, 2, 2), 5, 60, 12, "parallel"),
         "single": lambda: recipe.released(32, 8, (24, 2, 2), (32, 2, 2), 12, 60).but(start=1, end=2)}


@pytest.fixture(params=FORMS)
def system(request):
    torch.manual_seed(0)
    return shake(FORMS[request.param]().build())


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(5, 60, (5, 9), generator=g)
    text[:, 0] = 1
    for row, at in enumerate((8, 5, 3, 7, 4)):
        text[row, at], text[row, at + 1:] = 2, 0
    return {"image": torch.randn(5, 3, 32, 32, generator=g), "text": text}


def logits(system, batch, text=None):
    return system.tell(system.text(batch["text"] if text is None else text).tokens, system.vision(batch["image"]).tokens)


@torch.no_grad()
def test_the_token_behind_is_the_feature_and_no_word_sees_it(system, batch):
    feature, words = system.encode_text(batch["text"]), logits(system, batch)
    system.text.cls.add_(torch.randn(32))
    assert (system.encode_text(batch["text"]) - feature).abs().max() > 1e-3
    torch.testing.assert_close(logits(system, batch), words)


@torch.no_grad()
def test_the_token_behind_sees_all_words_and_no_padding_of_any_length(batch):
    system = shake(FORMS["cascade"]().build())
    text = batch["text"][1:2, :6]
    feature = system.encode_text(text)
    for more in (1, 3, 6):
        torch.testing.assert_close(system.encode_text(F.pad(text, (0, more))), feature)
    for at in range(6):
        other = text.clone()
        other[0, at] = 7
        assert (system.encode_text(other) - feature).abs().max() > 1e-4, at


@torch.no_grad()
def test_no_word_sees_a_later_one_in_either_half(system, batch):
    before, other = logits(system, batch), batch["text"].clone()
    other[:, 4] = 59
    after = logits(system, batch, other)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4] - before[:, 4]).abs().max() > 1e-4


@torch.no_grad()
def test_the_first_half_reads_no_picture_and_the_second_does(system, batch):
    said, blank = system.text(batch["text"]), torch.zeros_like(batch["image"])
    words = system.tell(said.tokens, system.vision(batch["image"]).tokens)
    assert (system.tell(said.tokens, system.vision(blank).tokens) - words).abs().max() > 1e-3
    assert not any("cross" in n or "norm_source" in n for n, _ in system.text.named_parameters())
    assert any("cross" in n or "norm_source" in n for n, _ in system.decoder.named_parameters())


def test_one_pass_of_each_half_gives_both_losses(system, batch):
    counts = {"vision": 0, "text": 0, "decoder": 0}
    for name in counts:
        first = {"vision": system.vision.tower.body, "text": system.text.body.blocks[0], "decoder": system.decoder}[name]
        target = first if name != "vision" else system.vision.tower.patch
        target.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    losses = system.both(system.read(batch))
    assert counts == {"vision": 1, "text": 1, "decoder": 1} and set(losses) == {"contrast", "caption"}
    label = batch["text"][:, 1:]
    want = F.cross_entropy(logits(system, batch)[:, :-1].flatten(0, 1), label.flatten(), ignore_index=0)
    torch.testing.assert_close(losses["caption"], want)
    torch.testing.assert_close(losses["contrast"], info_nce(system.encode_image(batch["image"]), system.encode_text(batch["text"]), system.scale))


def test_without_one_loss_what_only_it_needs_has_no_gradient(system, batch):
    losses = system.both(system.read(batch))
    losses.total((("caption", 0.0),)).backward(retain_graph=True)
    assert not any(p.grad.any() for p in system.decoder.parameters() if p.grad is not None) and system.log_scale.grad.abs() > 0
    assert not system.words.weight.grad.any() and system.text.body.blocks[0].attn.q.weight.grad.any()
    system.zero_grad()
    losses.total((("contrast", 0.0),)).backward()
    assert system.log_scale.grad == 0 and not system.text_head.weight.grad.any() and not system.text.cls.grad.any()
    assert system.vision.caption.query.grad.any() and system.text.body.blocks[0].attn.q.weight.grad.any()
    assert dict(preset_of("coca").stages[0].weights) == {"contrast": 1.0, "caption": 2.0}


def test_poolers_read_what_their_order_says():
    image = torch.randn(2, 3, 32, 32)
    for order, fed in (("cascade", 5), ("parallel", 17)):
        system, seen = shake(FORMS[order]().build()), []
        system.vision.contrast.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].shape[1]))
        out = system.vision(image)
        assert seen == [fed] and out.tokens.shape == (2, 5, 32) and out.pooled.shape == (2, 32)
    single = shake(FORMS["single"]().build()).vision
    whole = single.norm(single.caption(single.tower(image).tokens))
    assert single.contrast is None and single(image).tokens.shape == (2, 255, 32)
    torch.testing.assert_close(single(image).pooled, whole[:, 0])
    torch.testing.assert_close(single(image).tokens, whole[:, 1:])


@torch.no_grad()
def test_captions_are_written_with_a_cache_as_they_are_read_without(system, batch):
    image = batch["image"]
    new = system.generate_text(image, torch.tensor([[1]] * 5), max_new=6)
    text = torch.tensor([[1]] * 5)
    for n in range(new.shape[1]):
        best = logits(system, {"image": image, "text": text})[:, -1].argmax(-1)
        live = ~(new[:, :n] == 2).any(1)
        assert torch.equal(best[live], new[live, n])
        text = torch.cat([text, torch.where(live, best, 5)[:, None]], 1)
    mixed = torch.tensor([[1, 9, 8], [1, 0, 0], [1, 9, 8], [1, 7, 0], [1, 0, 0]])
    alone = [system.generate_text(image[i:i + 1], row[row != 0][None], max_new=4)[0] for i, row in enumerate(mixed)]
    together = system.generate_text(image, mixed, max_new=4)
    for row, want in zip(together, alone, strict=True):
        assert row[:len(want)].tolist() == want.tolist() and not row[len(want):].any()
    best = system.generate_text(image, torch.tensor([[1]] * 5), max_new=5, how=Beam.Config(beams=3))
    assert len(best) == 5
    assert system.generate_text(image, torch.tensor([[1]] * 5), max_new=99).shape[1] <= 12, "as long as the decoder reads"


def test_gradient_caching_of_both_losses_is_exact(batch):
    from contextlib import nullcontext

    from polysense.train.gradients import Call

    stage, grads = preset_of("coca").stages[0].but(batch_size=5), []
    for chunk in (None, 2):
        torch.manual_seed(0)
        system = shake(FORMS["cascade"]().build())
        backward(Call(system), stage.but(chunk=chunk), batch, lambda on: nullcontext())
        grads.append({n: p.grad for n, p in system.named_parameters()})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_new_task_learns_a_new_pooler_on_a_locked_encoder():
    freeze = polysense.load("freeze_tuning")
    from polysense.nn.head import LinearBias

    of = FORMS["parallel"]()
    config = freeze.FreezeTuning.Config(backbone=of.vision, head=LinearBias.Config(into=32, out=3))
    system = config.build()
    system.backbone.tower.load_state_dict(of.build().vision.tower.state_dict())
    before = {k: v.clone() for k, v in system.state_dict().items()}
    new = ("backbone.contrast.*", "head.*")
    stage = preset_of("freeze_tuning").stages[0].but(**{"trainable": new, "steps": 2, "batch_size": 4, "optim.warmup": 0})
    list(fit(system, stage, [{"image": torch.randn(4, 3, 32, 32), "label": torch.arange(4) % 3}] * 2))
    moved = {k for k, v in system.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("backbone.contrast", "head")) for k in moved)


@torch.no_grad()
def test_the_state_behind_the_text_fuses_picture_and_words(system, batch):
    fused = system.fuse(batch["image"], batch["text"])
    torch.testing.assert_close(system.fuse(batch["image"], F.pad(batch["text"], (0, 2))), fused)
    assert (system.fuse(batch["image"].roll(1, 0), batch["text"]) - fused).abs().max() > 1e-3
    assert (system.fuse(batch["image"], batch["text"].roll(1, 0)) - fused).abs().max() > 1e-3


def test_labels_are_texts_like_others_half_of_every_batch():
    from polysense.base.telling import Mixed, Triplets

    for name in ("tiny", "paper", "paper_base"):
        told = preset_of("coca", name).feed.told
        assert [type(t) for t in told] == [Triplets, Mixed] and told[1].shares == (0.5, 0.5), "carried out: tests/data/test_weblike"
    assert set(polysense.catalogue()["coca"].needs) == {"image", "text"}, "there is no head for labels"


def test_published_sizes():
    with torch.device("meta"):
        base = preset_of("coca", "paper_base").config.build()
    poolers = sum(p.numel() for m in (base.vision.caption, base.vision.contrast, base.image_head, base.text_head) for p in m.parameters())
    assert abs((sum(p.numel() for p in base.parameters()) - poolers) / 383e6 - 1) < 0.005


def test_bad_input_is_refused_in_one_line(batch):
    system = FORMS["cascade"]().build()
    with pytest.raises(UserError, match="at least one word"):
        system.generate_text(batch["image"], batch["text"][:2], max_new=3)
    with pytest.raises(UserError, match="shorter"):
        system.generate_text(batch["image"][:1], torch.full((1, 12), 9), max_new=3)
    with pytest.raises(UserError, match="reads at most 12"):
        system.encode_text(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(UserError, match="order='both'"):
        FORMS["cascade"]().but(**{"vision.order": "both"}).build()
