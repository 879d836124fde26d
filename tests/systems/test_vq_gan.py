"""VQ-GAN's essence (Esser et al. 2021)."""
import pytest
import torch
from fake import fake_batch
from PIL import Image

import polysense
from polysense.archetypes.generator import alternate
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.decoders.code_writer import drawn
from polysense.decoders.gumbel import GumbelQuantizer
from polysense.decoders.patch_critic import PatchCritic
from polysense.decoders.perceptual import Perceptual, vgg_rows
from polysense.objectives.codes import codebook_loss, commitment_loss
from polysense.pipeline import Pipeline
from polysense.train.fit import fit
from polysense.train.state import Training
from polysense.weights.lpips import write_perceptual

recipe = polysense.load("vq_gan")
TINY = preset_of("vq_gan")
CODEC = recipe.codec((8, 16), 1, 8, 16, 4, attend=(1,), groups=4)
LOOK = Perceptual.Config(rows=vgg_rows((1, 1), base=4), seen=(0, 1))
TOY = TINY.but(config=recipe.VQGAN.Config(codec=CODEC, prior=recipe.writer(16, 4, 16, 2, 2), critic=PatchCritic.Config(width=4, depth=1),
                                          perceptual=LOOK), starts=(), **{"feed.image.size": 8, "feed.train_image.size": 8})


def made(**change):
    torch.manual_seed(0)
    system = TOY.config.but(**change).build()
    with torch.no_grad():                                    # beyond birth, where blocks say nothing
        for p in system.codec.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return system


@pytest.fixture()
def system():
    return made()


@pytest.fixture(scope="module")
def batch():
    return {"image": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1}


# -- the codec --------------------------------------------------------------------------------------------------------------------------

def test_grid_is_a_sixteenth_of_the_side_and_the_parts_are_the_papers():
    c = preset_of("vq_gan", "paper").config
    assert c.codec.encoder.widths == (128, 128, 256, 256, 512) and (c.codec.encoder.depth, c.codec.encoder.attend) == (2, (4,))
    assert (c.codec.codes, c.codec.quantizer.width, c.codec.encoder.norm.groups, c.critic_from, c.critic_weight, c.form) == (
        16_384, 256, 32, 250_001, 0.8, "hinge")
    assert (c.critic.width, c.critic.depth, c.perceptual_weight, c.beta, c.beta_on, c.top_k) == (64, 3, 1.0, 0.25, "codebook", 100)
    body = c.prior.body
    assert (body.width, body.depth, body.heads, c.prior.side) == (1024, 24, 16, 16)
    with torch.device("meta"):
        codec = c.codec.build()
        assert codec.encode(torch.empty(1, 3, 256, 256)).shape == (1, 16, 16, 256) and codec.stride == 16
        assert preset_of("vq_gan", "gumbel").config.codec.build().stride == 8
    assert len(codec.encoder.down[4].attn) == 2 and len(codec.decoder.up[0].attn) == 3 and not len(codec.encoder.down[3].attn)
    assert codec.encoder.quant.kernel_size == codec.decoder.quant.kernel_size == (1, 1)
    plan = preset_of("vq_gan", "paper").stages[0].optim
    assert (plan.name, plan.betas, plan.lr) == ("adam", (0.5, 0.9), 4.5e-6 * 12)


def test_attention_of_a_level_looks_across_the_whole_map(system):
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    reach = torch.autograd.grad(system.codec.encoder.down[1].attn[0](x)[0, :, 0, 0].sum(), x)[0].abs().sum(1)[0]
    assert (reach > 0).all()


@torch.no_grad()
def test_decoding_the_codes_is_the_reconstruction_of_the_forward_pass(system, batch):
    system.eval()
    out, encoded, quantized = system.codec(batch["image"])
    ids = system.encode_codes(batch["image"])
    assert ids.shape == (4, 4, 4) and torch.equal(ids, quantized.ids) and encoded.shape == (4, 4, 4, 4)
    torch.testing.assert_close(system.decode_codes(ids), out)
    torch.testing.assert_close(system.reconstruct(batch["image"]), out)


def test_terms_are_the_papers_and_beta_stands_at_the_codebook(batch):
    for place, (first, second) in (("codebook", (0.25, 1.0)), ("commitment", (1.0, 0.25))):
        system = made(beta_on=place)
        drawn_, z, q = system.codec(batch["image"])
        losses = system.compress(batch)
        want = (batch["image"] - drawn_).abs().mean() + system.perceptual(batch["image"], drawn_).mean()
        torch.testing.assert_close(losses["detail"], want)
        torch.testing.assert_close(losses["codebook"], first * codebook_loss(z, q.vectors))
        torch.testing.assert_close(losses["commit"], second * commitment_loss(z, q.vectors))
    with pytest.raises(UserError, match="beta_on"):
        made(beta_on="both")


# -- the critic -------------------------------------------------------------------------------------------------------------------------

def test_before_its_time_the_loss_does_not_know_the_critic(batch):
    system = made(critic_from=3)
    before = dict(system.losses(batch))
    with torch.no_grad():
        for p in system.critic.parameters():
            p.mul_(-3)
    after = system.losses(batch)
    assert set(before) == {"detail", "codebook", "commit"} == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert set(made(critic_from=0).losses(batch)) == {"critic", "detail", "codebook", "commit", "fool"}


def test_it_joins_after_so_many_steps_of_the_codec_and_moves_from_then_on(batch):
    system, seen = made(critic_from=2), []
    start = {n: p.clone() for n, p in system.critic.named_parameters()}
    stage = TOY.stages[1].but(steps=4, batch_size=4)
    for step in fit(system, stage, iter([batch] * 4)):
        seen.append((set(step.losses), all(torch.equal(p, start[n]) for n, p in system.critic.named_parameters())))
    assert [("fool" in terms, "critic" in terms, still) for terms, still in seen] == [(False, False, True)] * 2 + [(True, True, False)] * 2
    assert int(system.met) == 4


def test_lambda_is_the_ratio_of_both_gradients_at_the_last_layer(system, batch):
    losses, drawn_ = system.rebuild(batch)
    fooled = -system.critic.looked_at(drawn_).mean()
    last = system.codec.decoder.conv_out.weight
    one, two = (torch.autograd.grad(t, last, retain_graph=True)[0].square().sum().sqrt() for t in (losses["detail"], fooled))
    weight = system.weigh(losses, fooled)
    torch.testing.assert_close(weight, 0.8 * one / (two + 1e-4))
    assert not weight.requires_grad
    torch.testing.assert_close(system.deceive(batch)["fool"], weight * fooled)
    scaled = system.weigh(losses, 1e9 * fooled)
    assert float(scaled) < float(weight) / 1e6, "a louder critic counts for no more"
    assert float(system.weigh(losses, 0 * fooled)) == pytest.approx(0.8 * min(float(one) / 1e-4, 1e4), rel=1e-4)


def test_the_critic_pays_the_hinge_of_patches(system, batch):
    system.critic.eval()
    with torch.no_grad():
        real, fake = system.critic(batch["image"]), system.critic(system.codec(batch["image"])[0])
    assert real.shape[1] == 1 and real[0].numel() > 1, "a verdict for every patch"
    want = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(system.judge(batch)["critic"], want)


def test_each_player_has_an_optimiser_and_leaves_the_other_alone(system, batch):
    stage = TOY.stages[1].but(batch_size=4)
    training, seen = Training(system, stage), {}
    before = {n: p.clone() for n, p in system.named_parameters()}
    real = system.deceive

    def watch(given):
        seen["codec"] = [p.grad for p in system.codec.parameters()]
        seen["moved"] = {n.split(".")[0] for n, p in system.named_parameters() if not torch.equal(p, before[n])}
        seen["critic"] = {n: (p.clone(), p.grad.clone()) for n, p in system.critic.named_parameters()}
        seen["statistics"] = {k: v.clone() for k, v in system.critic.state_dict().items()}
        return real(given)

    system.deceive = watch
    next(alternate(system, stage, iter([batch]), training))
    assert all(g is None for g in seen["codec"]) and seen["moved"] == {"critic"}
    assert all(torch.equal(p, seen["critic"][n][0]) and torch.equal(p.grad, seen["critic"][n][1]) for n, p in system.critic.named_parameters())
    assert all(torch.equal(v, seen["statistics"][k]) for k, v in system.critic.state_dict().items())
    assert any(not torch.equal(p, before[f"codec.{n}"]) for n, p in system.codec.named_parameters())
    assert set(training.optimizers) == {"critic", "codec"}
    assert all(o.param_groups[0]["betas"] == (0.5, 0.9) for o in training.optimizers.values())
    assert all(torch.equal(p, before[f"perceptual.{n}"]) for n, p in system.perceptual.named_parameters())


# -- what a network sees ----------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_perceptual_distance_is_never_silently_zero(system, batch):
    x = batch["image"]
    assert float(system.perceptual(x, x).abs().max()) == 0 and float(system.perceptual(x, x.flip(-1)).min()) > 0
    torch.testing.assert_close(system.perceptual(x, x.flip(-1)), system.perceptual(x.flip(-1), x))
    for preset in ("tiny", "paper", "gumbel"):
        assert any(s.into == "perceptual" and s.from_ == "vgg" for s in preset_of("vq_gan", preset).starts)
        assert preset_of("vq_gan", preset).config.perceptual_weight > 0


def test_published_files_take_the_place_of_the_start(tmp_path):
    from safetensors.torch import save_file

    other = LOOK.build()
    save_file(write_perceptual(other, LOOK), tmp_path / "lpips.safetensors")
    system = made(perceptual_files=(str(tmp_path / "lpips.safetensors"),))
    system.after_start()
    assert all(torch.equal(a, b) for a, b in zip(system.perceptual.parameters(), other.parameters(), strict=True))


# -- the Gumbel variant -----------------------------------------------------------------------------------------------------------------

def test_the_gumbel_variant_draws_hard_codes_with_soft_gradients(batch):
    system = made(codec=CODEC.but(quantizer=GumbelQuantizer.Config(codes=16, width=4)))
    q = system.codec.quantizer
    z = torch.randn(2, 4, 4, 4, requires_grad=True)
    out = q(z)
    torch.testing.assert_close(out.passed, q.codebook[out.ids])
    out.passed.square().sum().backward()
    assert z.grad.abs().sum() > 0 and q.head.weight.grad.abs().sum() > 0 and q.codebook.grad.abs().sum() > 0
    assert any(not torch.equal(q(z).ids, out.ids) for _ in range(5)), "drawn while it trains"
    assert set(system.compress(batch)) == {"detail", "kl"} and float(system.compress(batch)["kl"].detach()) > 0
    system.eval()
    assert torch.equal(q(z).ids, q.logits(z).argmax(-1)), "and argmax in use"
    keep = system.compress(batch).keep
    system.after_step(After(step=1, progress=1.0, optimizer=torch.optim.SGD(system.parameters(), 0.1), keep=keep))
    assert float(q.temperature) == pytest.approx(1 / 16) and int(system.met) == 1
    with pytest.raises(UserError, match="temperature"):
        GumbelQuantizer.Config(codes=4, width=4, temperature=(1.0, 0.0)).build()


# -- the second stage -------------------------------------------------------------------------------------------------------------------

def test_each_code_is_told_by_those_before_it_in_raster_order():
    torch.manual_seed(0)
    prior = recipe.writer(5, 3, 16, 2, 2).build()
    ids = torch.randint(5, (1, 3, 3))
    for place in range(9):
        other = ids.clone().flatten()
        other[place] = (other[place] + 1) % 5
        apart = (prior(ids) - prior(other.view(1, 3, 3))).abs().sum(-1).flatten() > 1e-6
        assert apart.tolist() == [i > place for i in range(9)]


def test_the_prior_learns_on_the_frozen_codec_and_nothing_else_moves(system, batch):
    before = {k: v.clone() for k, v in system.state_dict().items()}
    steps = list(fit(system, TOY.stages[2].but(steps=30, batch_size=4, **{"optim.lr": 1e-2}), iter([batch] * 30)))
    assert steps[-1].losses["codes"] < 0.7 * steps[0].losses["codes"]
    assert {k.split(".")[0] for k, v in system.state_dict().items() if not torch.equal(v, before[k])} == {"prior"}


def test_drawing_with_a_cache_is_the_same_as_without_and_takes_the_likeliest_codes():
    torch.manual_seed(0)
    prior = recipe.writer(7, 3, 16, 2, 2).build().eval()
    with torch.no_grad():
        greedy = prior.sample(2, top_k=1)
        ids = torch.zeros(2, 3, 3, dtype=torch.long)
        for y in range(3):
            for x in range(3):
                ids[:, y, x] = prior(ids)[:, y, x].argmax(-1)
    assert torch.equal(greedy, ids)
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(300, 1)
    assert set(drawn(logits, 1.0, 2).flatten().tolist()) == {1, 2} and set(drawn(logits, 1.0, 0).flatten().tolist()) == {0, 1, 2, 3}


@torch.no_grad()
def test_larger_grids_are_written_through_a_window():
    torch.manual_seed(0)
    prior, seen = recipe.writer(5, 3, 16, 1, 2).build().eval(), []
    whole = prior.forward
    prior.forward = lambda ids, front=None: seen.append(ids.shape) or whole(ids, front)
    wide = prior.sample(1, grid=(3, 5), top_k=1)
    assert wide.shape == (1, 3, 5) and len(seen) == 15 and set(seen) == {(1, 3, 3)}
    assert int(wide[0, 1, 4]) == int(whole(wide[:, :, 2:].where(torch.arange(9).view(3, 3) < 5, 0))[0, 1, 2].argmax())
    with pytest.raises(UserError, match="larger"):
        prior.sample(1, grid=(2, 3))


def test_a_second_codec_says_what_stands_before(batch):
    config = {"condition": CODEC, "coarse": 4, "prior": recipe.writer(16, 4, 16, 1, 2, front=16, told=16)}
    system, image = made(**config), batch["image"]
    coarse = image.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(system.before(image), system.condition.ids(coarse))
    one = system.fit_prior({"image": image})["codes"]
    system.before = lambda x: torch.zeros(4, 4, 4, dtype=torch.long)
    assert not torch.equal(one, system.fit_prior({"image": image})["codes"])
    del system.before
    assert system.enlarge(image[:1]).shape == (1, 3, 8, 8)
    assert system.enlarge(torch.rand(1, 3, 8, 16)).shape == (1, 3, 8, 16), "larger ones through a window"
    with pytest.raises(UserError, match="enlarges"):
        system.sample_image(1, steps=1)
    with pytest.raises(UserError, match="second codec"):
        made().enlarge(image)
    plan = preset_of("vq_gan", "enlarging")
    assert {s.into for s in plan.starts} == {"codec", "condition"} and plan.config.prior.front == plan.config.prior.side ** 2


def test_equal_seeds_draw_equal_pictures(system):
    torch.manual_seed(3)
    one = system.sample_image(2, steps=1)
    torch.manual_seed(3)
    assert one.shape == (2, 3, 8, 8) and torch.equal(system.sample_image(2, steps=1), one)


def test_verbs_go_from_files_to_pictures(tmp_path):
    place = tmp_path / "one.png"
    Image.effect_noise((12, 10), 80).convert("RGB").save(place)
    subject = Pipeline(made().eval(), TOY, None, id="vq_gan")
    codes = subject.encode_codes([place])
    assert codes.shape == (1, 4, 4)
    for pictures in (subject.decode_codes(codes), subject.reconstruct([place]), subject.generate(count=1, seed=3)):
        assert pictures[0].size == (8, 8)
    with pytest.raises(UserError, match="without words"):
        subject.generate(["a cat"])


# -- all of it --------------------------------------------------------------------------------------------------------------------------

def test_three_stages_train_in_turn(batch):
    system = made()
    for stage in TOY.stages:
        steps = list(fit(system, stage.but(steps=6, batch_size=4), iter([batch] * 6)))
        name = "codes" if stage.name == "prior" else "detail"
        assert min(s.losses[name] for s in steps) < steps[0].losses[name]
    assert system.health({"ids": system.encode_codes(batch["image"])}), "how many codes are in use is watched"


@pytest.mark.parametrize("ask", [
    lambda s: s.encode_codes(torch.rand(1, 3, 9, 8)), lambda s: s.encode_codes(torch.rand(1, 1, 8, 8)),
    lambda s: s.decode_codes(torch.full((1, 4, 4), 99)), lambda s: s.decode_codes(torch.zeros(4, 4, dtype=torch.long)),
    lambda s: s.decode_codes(torch.rand(1, 4, 4)), lambda s: s.prior(torch.zeros(1, 5, 5, dtype=torch.long)),
    lambda s: s.prior(torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))])
def test_what_it_cannot_read_is_one_line(system, ask):
    with pytest.raises(UserError) as caught:
        ask(system)
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_are_refused():
    for change in ({"form": "least squares"}, {"codec.encoder.attend": (7,)}):
        with pytest.raises(UserError):
            made(**change)


def test_tiny_is_what_the_essence_says():
    assert [(s.name, s.objective.__name__, s.run and s.run.__name__) for s in TINY.stages] == [
        ("codec", "compress", None), ("sharpen", "losses", "alternate"), ("prior", "fit_prior", None)]
    assert fake_batch(TINY, ("image",))["image"].shape[-1] // TINY.config.codec.encoder.stride == TINY.config.prior.side
