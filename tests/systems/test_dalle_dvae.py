"""The discrete VAE's essence (Ramesh et al. 2021, section 2.1 and appendix A)."""
from math import log

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.system import After
from polysense.objectives.codes import kl_of_use, kl_to_uniform, logit_laplace, map_pixels, relaxed_codes, unmap_pixels
from polysense.train.fit import fit
from polysense.train.schedule import factor

recipe = polysense.load("dalle_dvae")


@pytest.fixture()
def dvae():
    torch.manual_seed(0)
    return recipe.DiscreteVAE.Config(codec=recipe.codec(24, 8, 3, 1, 12), beta=(0.1, 6.6), cool=0.5, rise=0.1).build()


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_pixels_are_mapped_into_the_open_interval_and_back():
    x = torch.rand(100)
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])


def test_cold_samples_are_one_hot_and_every_temperature_has_a_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    for temperature in (1.0, 0.25, 1 / 16):
        soft = relaxed_codes(logits, temperature, torch.Generator().manual_seed(4))
        torch.testing.assert_close(soft.sum(-1), torch.ones(5))
        grad, = torch.autograd.grad((soft * torch.arange(7)).sum(), logits)
        assert grad.isfinite().all() and grad.abs().sum() > 0
    noise = relaxed_codes(logits, 1.0, torch.Generator().manual_seed(4)).log()                # logits + gumbel, up to a constant
    cold = relaxed_codes(logits, 1e-3, torch.Generator().manual_seed(4))
    assert torch.equal(cold.argmax(-1), noise.argmax(-1)) and cold.max(-1).values.min() > 0.99


def test_argmax_of_the_noisy_logits_is_a_sample_of_the_softmax():
    chance = torch.tensor([0.6, 0.3, 0.1])
    drawn = relaxed_codes(chance.log().expand(20_000, 3), 0.1, torch.Generator().manual_seed(0)).argmax(-1)
    torch.testing.assert_close(torch.bincount(drawn) / 20_000, chance, atol=0.015, rtol=0)


def test_divergence_from_the_uniform_prior_at_both_ends():
    assert kl_to_uniform(torch.full((3, 8192), 2.5)).abs().max() < 1e-5
    torch.testing.assert_close(kl_to_uniform(F.one_hot(torch.tensor([3]), 8192) * 1e4), torch.tensor([log(8192)]))
    p = torch.tensor([0.5, 0.25, 0.25])
    assert kl_to_uniform(p.log()).item() == pytest.approx(float((p * (p * 3).log()).sum()), abs=1e-6)


def test_uneven_use_is_the_part_of_the_divergence_that_all_places_share():
    """E KL(q(z|x) || u) = I(x; z) + KL(E q || u): nothing is left where codes are used alike, all of it where the same is used everywhere."""
    logits = torch.randn(6, 3, 5, 9) * 3
    mean = logits.softmax(-1).flatten(0, -2).mean(0)
    assert kl_of_use(logits).item() == pytest.approx(float((mean * (mean * 9).log()).sum()), abs=1e-5)
    told = (logits.softmax(-1) * (logits.log_softmax(-1) - mean.log())).sum(-1).mean()           # what a code tells of its place
    assert float(kl_to_uniform(logits).mean()) == pytest.approx(float(told + kl_of_use(logits)), abs=1e-5)
    assert kl_of_use(F.one_hot(torch.arange(9), 9) * 1e3) == pytest.approx(0, abs=1e-5)
    assert kl_of_use(F.one_hot(torch.tensor([4, 4]), 9) * 1e3) == pytest.approx(log(9), abs=1e-5)


def test_paper_has_the_bound_alone_and_short_runs_keep_codes_in_use(image):
    assert preset_of("dalle_dvae", "paper").config.even == 0 and preset_of("dalle_dvae", "paper").config.codec.encoder.spread == 1
    torch.manual_seed(0)
    watched = recipe.DiscreteVAE.Config(codec=recipe.codec(24, 8, 3, 1, 12), even=2.0).build()
    losses = watched.losses({"image": image})
    want = 2.0 * kl_of_use(watched.codec.logits(image)) * (2 * 4 * 4) / image.numel()
    assert set(losses) == {"reconstruct", "kl", "even"} and losses["even"].item() == pytest.approx(float(want), rel=1e-5)
    assert preset_of("dalle_dvae").config.even > 0 < preset_of("dalle_dvae", "small").config.even


def test_with_spread_weights_a_grey_picture_prefers_no_code():
    torch.manual_seed(0)
    codec = recipe.codec(64, 16, 3, 1, 12, spread=10.0).build()
    with torch.no_grad():
        grey = codec.encoder(torch.full((1, 3, 16, 16), 0.5))
        assert grey.mean((0, 2, 3)).abs().max() < 1e-4
        codec.encoder.output.bias.zero_()
        assert codec.encoder(torch.full((1, 3, 16, 16), 0.5)).mean((0, 2, 3)).std() > 1, "or the same few codes win everywhere"


@pytest.mark.parametrize("mu, log_b", [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.7)])
def test_logit_laplace_density_integrates_to_one(mu, log_b):
    x = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    density = torch.exp(-logit_laplace(x, torch.tensor(mu), torch.tensor(log_b)).double())
    assert float(density.mean()) == pytest.approx(1, abs=2e-3)


def test_training_draws_soft_codes_and_use_takes_the_best_without_noise(dvae, image):
    seen = []
    dvae.codec.decoder.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    dvae.losses({"image": image})
    soft = seen[0]
    assert soft.shape == (2, 24, 4, 4) and soft.requires_grad and ((soft > 1e-3) & (soft < 0.99)).any()
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 4, 4))
    ids = dvae.encode_codes(image)
    assert torch.equal(ids, dvae.encode_codes(image)) and torch.equal(ids, dvae.codec.logits(image).argmax(-1))


def test_decoding_codes_is_decoding_their_one_hots(dvae, image):
    ids = dvae.encode_codes(image)
    torch.testing.assert_close(dvae.decode_codes(ids), dvae.codec.picture(dvae.codec.spread(F.one_hot(ids, 24).float())[0]))
    assert torch.equal(dvae.reconstruct(image), dvae.decode_codes(ids))
    assert dvae.reconstruct(image).min() >= 0 and dvae.reconstruct(image).max() <= 1


def test_loss_is_the_bound_divided_by_the_number_of_values(dvae, image):
    torch.manual_seed(3)
    got = dvae.losses({"image": image})
    torch.manual_seed(3)
    logits = dvae.codec.logits(image)
    mu, log_b = dvae.codec.spread(relaxed_codes(logits, 1.0))
    bound = logit_laplace(map_pixels(image), mu, log_b).sum() + 0.1 * kl_to_uniform(logits).sum()
    assert got.total().item() == pytest.approx(float(bound / image.numel()), rel=1e-5)
    paper = preset_of("dalle_dvae", "paper").config.beta[1] * 32 * 32 / (256 * 256 * 3)
    assert paper == pytest.approx(6.6 / 192), "beta / 192 a place, as appendix A.2 counts"


def test_temperature_and_beta_move_only_after_a_step_and_along_half_a_cosine(dvae, image):
    dvae.losses({"image": image})
    assert float(dvae.temperature) == 1.0 and float(dvae.beta) == pytest.approx(0.1)
    optimizer = torch.optim.SGD(dvae.parameters(), 0.1)
    seen = []
    for step in range(1, 11):
        dvae.after_step(After(step, step / 10, optimizer, {}))
        seen.append((float(dvae.temperature), float(dvae.beta)))
    assert seen[4][0] == seen[-1][0] == pytest.approx(1 / 16) and seen[0][1] == seen[-1][1] == pytest.approx(6.6)
    assert seen[1][0] == pytest.approx(recipe.eased(1, 1 / 16, 0.4)) and recipe.eased(1, 0, 0.5) == pytest.approx(0.5)
    assert {"temperature", "beta"} <= set(dvae.state_dict()), "a resumed run goes on where it was"


def test_blocks_are_the_papers():
    with torch.device("meta"):
        codec = preset_of("dalle_dvae", "paper").config.codec.build()
    encoder, decoder = codec.encoder, codec.decoder
    assert [[b.convs[3].out_channels for b in s] for s in encoder.stages] == [[256] * 2, [512] * 2, [1024] * 2, [2048] * 2]
    assert [c.kernel_size[0] for c in encoder.stages[0][0].convs] == [3, 3, 3, 1]
    assert [c.kernel_size[0] for c in decoder.stages[0][0].convs] == [1, 3, 3, 3]
    assert encoder.stages[1][0].gain == 1 / 64 == decoder.stages[3][1].gain and codec.stride == 8 and codec.codes == 8192
    assert encoder.input.kernel_size == (7, 7) and decoder.output.out_channels == 6


def test_tiny_trains_through_the_one_loop_and_cools():
    preset = preset_of("dalle_dvae").but(**{"config.codec.encoder.width": 8, "config.codec.decoder.width": 8})
    system, stage = preset.config.build(), preset.stages[0].but(steps=20, **{"optim.warmup": 0})
    batch = {"image": fake_batch(preset, ("image",), n=4)["image"].sigmoid()}
    steps = list(fit(system, stage, iter([batch] * 20)))
    assert steps[-1].losses["reconstruct"] < steps[0].losses["reconstruct"] and float(system.temperature) == pytest.approx(1 / 16)


@pytest.mark.parametrize("call", [
    lambda s: s.encode_codes(torch.rand(1, 1, 16, 16)), lambda s: s.encode_codes(torch.rand(1, 3, 18, 16)),
    lambda s: s.decode_codes(torch.full((1, 4, 4), 24)), lambda s: s.decode_codes(torch.zeros(1, 4, 4)),
    lambda s: s.decode_codes(torch.zeros(4, 4, dtype=torch.long)),
    lambda s: recipe.codec(8, 8, 3, 1, 8).but(**{"decoder.codes": 9}).build()])
def test_what_is_no_picture_and_no_code_is_refused(dvae, call):
    with pytest.raises(UserError) as caught:
        call(dvae)
    assert "\n" not in str(caught.value)


def test_paper_schedules_are_those_of_appendix_a():
    plan, steps = preset_of("dalle_dvae", "paper"), 3_000_000
    stage, c = plan.stages[0], plan.config
    assert (stage.steps, stage.batch_size, stage.ema, stage.optim.weight_decay) == (steps, 512, 0.999, 1e-4)
    assert (c.cool * steps, c.rise * steps) == pytest.approx((150_000, 5000))
    rate = [stage.optim.lr * factor(stage.optim, at, steps) for at in (0, 600_000, 1_200_000, steps)]
    assert rate == pytest.approx([1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6])
