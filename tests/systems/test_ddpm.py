"""DDPM's essence (Ho et al. 2020), in the notation x_t = a_t x_{t-1} + b_t e_t, A_t = a_1 ... a_t, B_t = sqrt(1 - A_t^2)."""
import pytest
import torch
from fake import fake_batch

import polysense
from polysense.archetypes.denoiser import Sampler
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.nn.spatial import ResBlock, SpatialAttention
from polysense.nn.time import sinusoid
from polysense.objectives import samplers
from polysense.objectives.diffusion import betas, guided, kept_share, last_noise, noised, posterior, step_back, target, understood
from polysense.systems.generate.ddpm import unet

polysense.load("ddpm")
SMALL = {"config.unet": unet((8, 16), (1,), depth=1, groups=4), "config.size": 8, "feed.image.size": 8, "feed.train_image.size": 8}


@pytest.fixture()
def ddpm():
    torch.manual_seed(0)
    return preset_of("ddpm").but(**SMALL).config.build()


@pytest.fixture(scope="module")
def taught():
    """A network whose last convolution is no longer zero."""
    torch.manual_seed(0)
    system = preset_of("ddpm").but(**SMALL).config.build()
    with torch.no_grad():
        for p in system.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return system.eval()


def test_a_new_network_says_exactly_nothing(ddpm):
    assert not ddpm.unet(torch.randn(2, 3, 8, 8), torch.tensor([0, 999])).any()


@pytest.mark.parametrize("t", [0, 500, 999])
def test_the_loss_of_saying_nothing_is_one_at_every_time(ddpm, t, monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda high, shape, device: torch.full(shape, t))
    assert float(ddpm.missed(torch.randn(256, 3, 8, 8), lambda x, t: torch.zeros_like(x))) == pytest.approx(1, abs=0.02)


def test_times_are_uniform_and_the_loss_has_no_weight(ddpm):
    seen = []
    loss = ddpm.missed(torch.randn(4000, 1, 1, 1), lambda x, t: (seen.append(t), torch.full_like(x, 2.0))[1])
    t = torch.cat(seen).float()
    assert t.min() < 10 and t.max() > 989 and abs(t.mean() - 499.5) < 20 and abs(t.std() - 288.7) < 15
    assert float(loss.detach()) == pytest.approx(5, abs=0.3)                                # E (e - 2)^2 = 1 + 4, whatever t is


def test_all_steps_together_are_one(ddpm):
    """The one-step kernel t times, on a constant: mean A_t x_0 and variance B_t^2."""
    beta, n, t, x0 = betas("linear", 1000), 20000, 300, 1.5
    x, g = torch.full((n,), x0, dtype=torch.float64), torch.Generator().manual_seed(0)
    for b in beta[:t + 1]:
        x = (1 - b).sqrt() * x + b.sqrt() * torch.randn(n, generator=g, dtype=torch.float64)
    kept = float(kept_share(beta)[t])
    assert float(x.mean()) == pytest.approx(kept ** 0.5 * x0, abs=0.025) and float(x.var()) == pytest.approx(1 - kept, abs=0.025)
    assert float(ddpm.kept[-1]) < 1e-4, "A_T is nearly 0: the end is noise"
    e = torch.randn(2, 3)
    torch.testing.assert_close(noised(torch.ones(2, 3), e, torch.tensor([kept, kept])), kept ** 0.5 + (1 - kept) ** 0.5 * e)


def test_the_two_noises_are_told_apart():
    """(x_t - b_t eps_theta) / a_t with eps_theta = (b_t / B_t) eps is the mean of the posterior; without the factor it is not."""
    kept = kept_share(betas("linear", 1000))
    x, e = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    for t in (1, 400, 999):
        now, before = kept[t].view(1), kept[t - 1].view(1)
        mean, deviation = posterior(x, understood(e, x, now)[0], now, before, "large")
        torch.testing.assert_close(step_back(x, last_noise(e, now, before), now, before), mean)
        b = (1 - now / before).sqrt()
        torch.testing.assert_close((x - b ** 2 / (1 - now).sqrt() * e) / (now / before).sqrt(), mean)
        assert not torch.allclose(step_back(x, e, now, before), mean, atol=1e-3)
        torch.testing.assert_close(deviation, b)
        torch.testing.assert_close(posterior(x, x, now, before, "small")[1], b * ((1 - before) / (1 - now)).sqrt())


def test_the_last_step_adds_no_noise(ddpm):
    drawn = []
    x = torch.randn(2, 1, 2, 2)
    list(samplers.ddpm(lambda x, t: (x, x), x, ddpm.kept, [500, 0], noise=lambda x: (drawn.append(1), torch.randn_like(x))[1]))
    assert len(drawn) == 1


@pytest.mark.parametrize("name, steps", [("ddpm", 1000), ("ddpm", 10), ("ddim", 10), ("dpm", 10), ("plms", 10)])
def test_with_the_exact_noise_of_one_point_sampling_returns_it(ddpm, name, steps):
    point = torch.rand(1, 3, 8, 8) * 2 - 1

    def exact(x, t):
        kept = ddpm.kept[t].view(-1, 1, 1, 1)
        return (x - kept.sqrt() * point) / (1 - kept).sqrt()

    got = ddpm.drawn(torch.randn(2, 3, 8, 8), exact, steps, Sampler(name=name))
    torch.testing.assert_close(got, point.expand(2, -1, -1, -1), atol=2e-2 if name != "ddpm" else 1e-3, rtol=0)


@pytest.mark.parametrize("predict", ["noise", "velocity", "start"])
def test_targets_are_understood(predict):
    x, e, kept = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.9, 0.5, 0.1])
    got = understood(target(x, e, kept, predict), noised(x, e, kept), kept, predict)
    torch.testing.assert_close(got[0], x)
    torch.testing.assert_close(got[1], e)


def test_cosine_keeps_more_in_the_middle_and_guidance_is_linear():
    linear, cosine = (kept_share(betas(k, 1000)) for k in ("linear", "cosine"))
    assert cosine[500] > 4 * linear[500] and cosine[-1] < 1e-3
    free, given = torch.randn(2), torch.randn(2)
    assert torch.equal(guided(free, given, 0.0), free)
    torch.testing.assert_close(guided(free, given, 1.0), given)
    torch.testing.assert_close(guided(free, given, 3.0) - free, 3 * (given - free))


def test_every_residual_block_hears_the_time(taught):
    heard = {}
    hooks = [m.register_forward_hook(lambda m, args, out, n=n: heard.setdefault(n, []).append((args[0], out)))
             for n, m in taught.unet.named_modules() if isinstance(m, ResBlock)]
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        time = [taught.unet.told(x, torch.tensor(t)) for t in (3, 800)]
        taught.unet(x, torch.tensor(3))
        for h in hooks:
            h.remove()
        assert len(heard) == 2 + 2 + 2 * 2, "one a level down, two in the middle, two a level up"
        for name, ((given, _),) in heard.items():
            block = taught.unet.get_submodule(name)
            assert not torch.allclose(block(given, time[0]), block(given, time[1]), atol=1e-4), name


def test_the_paper_network_has_what_the_paper_says():
    with torch.device("meta"):
        system = preset_of("ddpm", "paper").config.build()
    attns = [n for n, m in system.unet.named_modules() if isinstance(m, SpatialAttention)]
    assert sorted(attns) == sorted(["down.1.attn.0", "down.1.attn.1", "mid.attn", *(f"up.2.attn.{i}" for i in range(3))]), "16x16 and the middle"
    assert system.unet.up[0].blocks[0].conv1.in_channels == 512, "skips are joined by concatenation"
    stage = preset_of("ddpm", "paper").stages[0]
    assert (stage.ema, stage.steps, stage.batch_size, stage.optim.lr) == (0.9999, 800_000, 128, 2e-4)
    with torch.device("meta"):
        large = preset_of("ddpm", "paper256").config.build()
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(114e6, rel=0.01)


def test_sinusoid_ends_where_the_paper_ends():
    waves = sinusoid(torch.tensor([1.0]), 8, shift=1.0, order="sin cos")
    torch.testing.assert_close(waves[0, 3], torch.tensor(1e-4).sin())
    torch.testing.assert_close(waves[0, 0], torch.tensor(1.0).sin())


def test_sampling_is_seeded_and_stays_in_range(taught):
    def draw(seed):
        torch.manual_seed(seed)
        return taught.sample_image(2, steps=4)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).abs().max() <= 1 and draw(1).shape == (2, 3, 8, 8)


def test_an_average_of_the_weights_is_kept(ddpm):
    from polysense.train.fit import fit
    from polysense.train.state import Training
    preset = preset_of("ddpm").but(**SMALL)
    stage = preset.stages[0].but(steps=3, batch_size=4)
    training = Training(ddpm, stage)
    list(fit(ddpm, stage, iter([fake_batch(preset, ("image",))] * 3), training=training))
    assert training.average is not None and set(training.average.weights) == {n for n, _ in ddpm.named_parameters()}


@pytest.mark.parametrize("call", [
    lambda s: s.sample_image(0, steps=2), lambda s: s.sample_image(1, steps=0), lambda s: s.sample_image(1, steps=1001),
    lambda s: s.unet(torch.randn(1, 3, 7, 7), torch.tensor([1])), lambda s: s.unet(torch.randn(1, 4, 8, 8), torch.tensor([1])),
    lambda s: s.unet(torch.randn(1, 3, 8, 8), torch.tensor([1]), add=[torch.zeros(1)]),
    lambda s: s.drawing(torch.randn(1, 3, 8, 8), s.unet, 2, Sampler(name="heun"))], ids=range(7))
def test_bad_calls_get_one_line(ddpm, call):
    with pytest.raises(UserError) as caught:
        call(ddpm)
    assert "\n" not in str(caught.value)


def test_unknown_schedules_are_refused():
    with pytest.raises(UserError, match="linear"):
        preset_of("ddpm").but(**SMALL, **{"config.schedule": "square"}).config.build()
