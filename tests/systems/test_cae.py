"""CAE's essence (Chen et al. 2022): who sees what, and what may reach whom."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.masking import masking_by, masking_of
from polysense.train.fit import fit

recipe = polysense.load("cae")
TOY = {"config.encoder.body.width": 32, "config.encoder.body.depth": 2, "config.encoder.body.heads": 2, "config.decoder.body.width": 32,
       "config.decoder.body.heads": 2}
CODEC = {"config.target.truth.codec.encoder.width": 8, "config.target.truth.codec.decoder.width": 8}


def toy(preset="tiny", **more):
    torch.manual_seed(0)
    made = preset_of("cae", preset).but(**TOY, **more).config.build()
    with torch.no_grad():
        for p in (*made.encoder.parameters(), *made.decoder.parameters()):
            p.add_(torch.randn_like(p) * 0.05)
    made.after_start()
    return made.eval()


@pytest.fixture()
def cae():
    return toy(**CODEC)


@pytest.fixture(scope="module")
def image():
    return fake_batch(preset_of("cae"), ("image",), n=3)["image"]


def behind(image, mask):
    """The same with noise where mask is True."""
    return torch.where(mask.view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3), torch.randn_like(image), image)


def test_both_passes_read_patches_alone_and_no_mask_token_enters_the_encoder(cae, image):
    lengths = []
    for tower in (cae.encoder, cae.target.teacher.module):
        tower.body.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    cae.losses({"image": image})
    assert sorted(lengths) == [1 + 32, 1 + 32] and not list(cae.hide.parameters())
    masking = cae.masking(image)
    assert (masking.mask.sum(1) == 32).all() and masking.visible == 32
    seen = cae.see(image, masking)
    cae.decoder.token.data.add_(1)
    assert torch.equal(cae.see(image, masking), seen) and torch.equal(cae.see(behind(image, masking.mask), masking), seen)
    paper = preset_of("cae", "paper").config
    assert (paper.sampler.hidden, paper.sampler.least, paper.encoder.position) == (98, 16, "sincos")


def test_the_aim_is_what_the_same_encoder_says_of_the_complement_alone(cae, image):
    masking = cae.masking(image)
    other = masking_of(~masking.mask)
    want = cae.encoder(image, keep=other.keep).tokens[:, 1:]
    aim = cae.target.features(image, masking)
    torch.testing.assert_close(aim, want)
    assert torch.equal(cae.target.features(behind(image, ~masking.mask), masking), aim), "visible pixels do not reach it"
    assert not aim.requires_grad and not list(cae.target.teacher.parameters())


def test_regressor_asks_with_positions_reads_values_without_and_leaves_what_is_seen(cae, image):
    masking = cae.masking(image)
    seen = cae.see(image, masking)
    block, calls = cae.decoder.blocks[0], []
    block.attn.register_forward_pre_hook(lambda m, args, kw: calls.append((*args, kw["value"])), with_kwargs=True)
    fed = []
    cae.decoder.blocks[1].register_forward_pre_hook(lambda m, args: fed.append(args[1]))
    cae.decoder.regress(seen, masking)
    place = cae.decoder.position[0]
    here, there = place[masking.hidden], place[masking.keep]
    token = cae.decoder.token.expand(3, 32, -1)
    q, k, v = calls[0]
    norm = lambda n, x: F.layer_norm(x, (32,), n.weight, n.bias, 1e-6)
    torch.testing.assert_close(q, norm(block.norm_q, token + here))
    torch.testing.assert_close(k, norm(block.norm_k, torch.cat([seen[:, 1:] + there, token + here], 1)))
    torch.testing.assert_close(v, norm(block.norm_v, torch.cat([seen[:, 1:], token], 1)))
    assert torch.equal(fed[0], seen[:, 1:]), "visible features stay as they are from block to block"
    moved = seen.clone()
    moved[:, 0] += 1
    assert torch.equal(cae.decoder.regress(moved, masking), cae.decoder.regress(seen, masking)), "the class token is not read"


def test_the_decoder_knows_the_regressed_features_alone(cae, image):
    masking = cae.masking(image)
    seen = cae.see(image, masking)
    said, latents = cae.decoder(seen, masking)
    assert torch.equal(cae.decoder.say(latents, masking), said) and said.shape == (96, 64)
    other = cae.decoder.regress(seen + torch.randn_like(seen), masking)
    assert not torch.allclose(other, latents), "what is seen matters to the regressor"
    swapped = latents.clone()
    swapped[:, [2, 5]] = swapped[:, [5, 2]]
    assert not torch.allclose(cae.decoder.say(swapped, masking), said), "features come with their positions"
    changed = latents.clone()
    changed[0, 3] += 1
    moved = (cae.decoder.say(changed, masking) - said).abs().amax(1).view(3, 32)
    assert (moved[0] > 0).all() and (moved[1:] == 0).all()


def test_without_a_regressor_only_places_are_known(image):
    model = toy(**CODEC, **{"config.decoder.depth": 0})
    masking = masking_of(torch.rand(1, 64, generator=torch.Generator().manual_seed(1)).argsort(1).expand(3, -1) < 32)
    said, _ = model.decoder(model.see(image, masking), masking)
    one, *others = said.view(3, 32, -1)
    assert all(torch.equal(one, o) for o in others) and not torch.allclose(one[0], one[1])


def test_loss_is_cross_entropy_plus_twice_the_alignment_in_one_order(cae, image):
    masking = masking_by(torch.rand(3, 64), 32)                          # hidden in no order
    (said, latents), (ids, aim) = cae.pairs(image, masking)
    codes = cae.target.truth.ids(image).flatten(1)
    ordered = cae.pairs(image, masking_of(masking.mask))
    torch.testing.assert_close(latents, ordered[0][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aim, ordered[1][1], rtol=1e-4, atol=1e-5)
    want = -said.log_softmax(-1)[torch.arange(96), codes[masking.mask]].mean()
    stage = preset_of("cae").stages[0]
    torch.manual_seed(3)
    losses = cae.losses({"image": image})
    torch.manual_seed(3)
    mask = cae.masking(image)
    (a, b), (c, d) = cae.pairs(image, mask)
    assert set(losses) == {"codes", "align"} and torch.isfinite(want)
    torch.testing.assert_close(losses.total(stage.weights), F.cross_entropy(a, c) + 2 * (b - d).square().mean())
    torch.testing.assert_close(F.cross_entropy(said, ids), want)
    assert preset_of("cae", "paper").stages[0].weights == (("align", 2.0),)


def test_the_teacher_is_the_encoder_after_every_step_and_the_tokenizer_never_learns(cae, image):
    before = {k: v.clone() for k, v in cae.target.truth.state_dict().items()}
    stage = preset_of("cae").stages[0].but(steps=4, **{"optim.warmup": 0})
    cae.choose_trainable(stage.trainable)
    batch = {"image": image}
    cae.losses(batch).total(stage.weights).backward()
    assert all(p.grad is None for p in cae.target.parameters())
    start = {k: v.clone() for k, v in cae.encoder.state_dict().items()}
    for step in fit(cae, stage, iter([batch] * 4)):
        teacher = cae.target.teacher.module.state_dict()
        assert all(torch.equal(v, teacher[k]) for k, v in cae.encoder.state_dict().items()), f"step {step.index}"
    assert any(not torch.equal(v, start[k]) for k, v in cae.encoder.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in cae.target.truth.state_dict().items())


def test_it_learns_and_predictions_come_to_lie_with_their_own_picture():
    model, colours = toy(**CODEC), torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]])
    image = colours[:, :, None, None] + torch.randn(3, 3, 64, 64) * 0.3
    stage = preset_of("cae").stages[0].but(steps=25, **{"optim.warmup": 3, "optim.lr": 4e-3})
    steps = list(fit(model, stage, iter([{"image": image}] * 25)))
    assert steps[-1].total < 0.8 * steps[0].total
    own, other = model.eval().alignment(image)
    assert own.shape == (3,) and own.mean() > other.mean() + 0.02


def test_v2_names_clips_features_of_hidden_and_of_visible_patches(image):
    small = {"config.target.truth.tower.body.depth": 1, "config.target.truth.tower.body.width": 24, "config.target.truth.head.into": 24,
             "config.target.truth.head.out": 16, "config.target.truth.width": 16, "config.visible.into": 32, "config.visible.out": 16}
    model, plan = toy("tiny_v2", **small), preset_of("cae", "tiny_v2")
    torch.manual_seed(2)
    masking = model.masking(image)
    seen, truth = model.see(image, masking), model.target.truth.whole(image)
    said = model.decoder(seen, masking)[0].view(3, 32, 16)
    hidden = torch.stack([F.cosine_similarity(said[b], truth[b][masking.mask[b]], dim=-1) for b in range(3)]).mean()
    visible = torch.stack([F.cosine_similarity(model.visible(seen[b, 1:]), truth[b][~masking.mask[b]], dim=-1) for b in range(3)]).mean()
    torch.manual_seed(2)
    losses = model.imitate({"image": image})
    torch.testing.assert_close(losses["hidden"], 1 - hidden)
    torch.testing.assert_close(losses["visible"], 1 - visible)
    model.choose_trainable(plan.stages[0].trainable)
    losses.total(plan.stages[0].weights).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.target.parameters()) and plan.stages[0].objective is recipe.CAE.imitate
    with pytest.raises(UserError, match="no head for visible"):
        toy(**CODEC).imitate({"image": image})


def test_what_does_not_fit_is_refused(cae):
    with pytest.raises(UserError, match="equal widths"):
        preset_of("cae").but(**{"config.decoder.body.width": 48}).config.build()
    with pytest.raises(UserError, match="different numbers"):
        cae.decoder(torch.randn(2, 33, 32), masking_of(torch.rand(2, 64) < torch.tensor([[0.3], [0.8]])))
    with pytest.raises(UserError):
        cae.losses({"image": torch.randn(1, 3, 60, 60)})
