"""The unified view of masked image modelling: every named method is a choice of slots, and words put teachers in."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.decoders.codes import CodeHead
from polysense.decoders.hog import HOGTarget
from polysense.decoders.pixels import PixelTarget
from polysense.mechanisms.mask_sampler import DropHidden
from polysense.train.fit import fit
from polysense.train.run import override

recipe = polysense.load("mim_framework")
SMALL = {"config.encoder.body.width": 24, "config.encoder.body.depth": 2, "config.encoder.body.heads": 2}
TARGETS, METHODS = list(recipe.MIMFramework.choices["target"]), list(recipe.METHODS)


def aimed(word):
    plan = override(preset_of("mim_framework").but(**SMALL), {"target": word})
    return plan.but(**{"config.target.tower.body.depth": 1}) if word in ("clip", "dino") else plan


@pytest.fixture(scope="module")
def image():
    return fake_batch(preset_of("mim_framework"), ("image",), n=3)["image"]


def begun(plan):
    torch.manual_seed(0)
    system = plan.config.build()
    with torch.no_grad():
        for p in system.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    system.after_start()
    return system.eval()


@pytest.mark.parametrize("name", METHODS)
def test_a_named_method_is_that_very_system(name, image):
    """Slots are equal values; with equal weights, seed and batch, loss and every gradient are equal."""
    theirs, ours = preset_of(name), override(preset_of("mim_framework"), {"method": name})
    for slot in ("encoder", "sampler", "hide", "decoder", "target", *(("aggregate", "early") if name == "beit_v2" else ())):
        assert getattr(ours.config, slot) == getattr(theirs.config, slot)
    videos = polysense.catalogue()[name].needs == ("video",)
    batch = fake_batch(theirs, ("video",), n=2) if videos else {"image": image}
    assert (ours.feed, ours.starts, ours.data, ours.stages[0].optim) == (theirs.feed, theirs.starts, theirs.data, theirs.stages[0].optim)
    a, b = begun(theirs), begun(ours)
    b.load_state_dict(a.state_dict())
    totals, grads = [], []
    for system, stage in ((a, theirs.stages[0]), (b, ours.stages[0])):
        system.choose_trainable(stage.trainable)
        torch.manual_seed(5)
        loss = stage.objective(system, batch).total(stage.weights)
        loss.backward()
        totals.append(loss)
        grads.append({n: p.grad for n, p in system.named_parameters() if p.grad is not None})
    assert torch.equal(*totals) and grads[0].keys() == grads[1].keys() and all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())
    assert list(b.doubts(fake_batch(theirs, ("image", "video"), n=2))) == [], "it looks at what it reads alone"


@pytest.mark.parametrize("word", TARGETS)
def test_words_change_teacher_head_and_loss_alone_and_each_learns(word, image):
    base, plan = preset_of("mim_framework").but(**SMALL), aimed(word)
    for slot in ("encoder", "sampler", "hide"):
        assert getattr(plan.config, slot) == getattr(base.config, slot)
    assert plan.stages == base.stages and plan.feed == base.feed and plan.data == base.data
    system = begun(plan)
    before = {k: v.clone() for k, v in system.target.state_dict().items()}
    stage = plan.stages[0].but(steps=12, **{"optim.warmup": 1})
    system.choose_trainable(stage.trainable)
    torch.manual_seed(1)
    system.losses({"image": image}).total().backward()
    assert all(p.grad is None for p in system.target.parameters()) and all(torch.equal(v, before[k]) for k, v in system.target.state_dict().items())
    steps = list(fit(system, stage, iter([{"image": image}] * 12)))
    assert steps[-1].total < steps[0].total
    moved = any(not torch.equal(v, before[k]) for k, v in system.target.state_dict().items())
    assert moved == (word == "ema"), "an average follows the student, nothing else moves"


@pytest.mark.parametrize("word", TARGETS)
def test_noise_behind_the_mask_changes_the_target_side_only(word, image):
    system = begun(aimed(word))
    masking = system.masking(image)
    hidden = masking.mask.view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(image), image)
    (said, truth), (again, moved) = system.pairs(image, masking), system.pairs(other, masking)
    assert torch.equal(said, again) and not torch.equal(truth, moved) and not truth.requires_grad


def test_low_and_high_level_targets_are_told_apart():
    assert {w: aimed(w).config.build().level for w in TARGETS} == {
        w: "low" if w in ("pixel", "hog", "fourier") else "high" for w in TARGETS}


@pytest.mark.parametrize("changes, says", [
    ({"config.loss": "ce"}, "loss=ce does not fit CodeHead and GridPixels"), ({"config.loss": "kl"}, "no loss='kl'"),
    ({"config.hide": DropHidden.Config()}, "leaves CodeHead without those it reads"), ({"config.loss": "geminated"}, "does not fit"),
    ({"config.target": PixelTarget.Config(patch=8)}, "take GridPixels"), ({"config.aggregate": preset_of("beit_v2").config.aggregate}, "names codes"),
     ({"config.target": HOGTarget.Config(patch=8, cell=4, norm="l2")}, "norm")])
def test_contradictory_slots_are_refused_in_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        preset_of("mim_framework").but(**changes).config.build()
    assert "\n" not in str(caught.value)


def test_codes_take_cross_entropy_and_drawers_take_the_tokens_they_read():
    with pytest.raises(UserError, match="it takes loss=ce"):
        override(aimed("dvae"), {"loss": "mse"}).config.build()
    with pytest.raises(UserError, match="it takes loss=frequency"):
        override(aimed("fourier"), {"loss": "l1"}).config.build()
    mae = override(preset_of("mim_framework"), {"method": "mae"})
    with pytest.raises(UserError, match="FillHidden leaves MAEDecoder with other tokens"):
        mae.but(**{"config.hide": preset_of("mim_framework").config.hide}).config.build()
    assert isinstance(preset_of("mim_framework").config.decoder, CodeHead.Config)


def test_words_are_checked_and_survive_a_file():
    from polysense.base.spec import from_dict

    with pytest.raises(UserError, match="pixel, hog, fourier, dvae, vqkd, clip, dino, ema"):
        override(preset_of("mim_framework"), {"target": "colour"})
    with pytest.raises(UserError, match="mae, simmim"):
        override(preset_of("mim_framework"), {"method": "gan"})
    for word in TARGETS:
        plan = override(preset_of("mim_framework"), {"target": word, "encoder.body.depth": 3})
        assert from_dict(plan.to_dict()) == plan and plan.config.encoder.body.depth == 3


def test_it_draws_where_there_is_something_to_draw(image):
    for word in ("pixel", "fourier"):
        system = begun(aimed(word))
        masking = system.masking(image)
        assert system.reconstruct(image, masking).shape == image.shape
    with pytest.raises(UserError, match="predicts HOG, which is no picture"):
        begun(aimed("hog")).reconstruct(image)
