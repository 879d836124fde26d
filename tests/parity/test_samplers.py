"""Schedules and samplers against diffusers' schedulers, step by step with equal noise. Tolerance 1e-5."""
import pytest
import torch
from reference import reference

from polysense.objectives import samplers
from polysense.objectives.diffusion import betas, kept_share, noised, target, understood

SHAPE, T = (2, 3, 4, 4), 100
KEPT = kept_share(betas("linear", T, 1e-3, 0.1)).float()
OPTIONS = {"num_train_timesteps": T, "beta_start": 1e-3, "beta_end": 0.1}


def net(x: torch.Tensor, t: int) -> torch.Tensor:
    """Any function of x and t will do for a network."""
    return torch.sin(2 * x + t / 30) * 0.9


def denoise(x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    return understood(net(x, t), x, KEPT[t].view(1))


def noise_from(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


def trajectory(scheduler, x: torch.Tensor, steps: int, seed: int = 5, **options) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    generator, out = torch.Generator().manual_seed(seed), []
    options |= {} if type(scheduler).__name__ in ("PNDMScheduler",) else {"generator": generator}
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, int(t)), t, x, **options).prev_sample
        out.append(x)
    return out


def assert_same(ours, theirs):
    ours = list(ours)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, theirs", [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules(kind, theirs):
    want = reference("diffusers").DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs, beta_start=1e-4, beta_end=0.02)
    got = kept_share(betas(kind, 1000, 1e-4, 0.02)).float()
    torch.testing.assert_close(got, want.alphas_cumprod, rtol=1e-4, atol=1e-6)
    x, e, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([10, 990])
    torch.testing.assert_close(noised(x, e, got[t]), want.add_noise(x, e, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target(x, e, got[t], "velocity"), want.get_velocity(x, e, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("steps", [T, 20])
def test_ancestral(variance, steps):
    x = torch.randn(SHAPE)
    scheduler = reference("diffusers").DDPMScheduler(**OPTIONS, variance_type=f"fixed_{variance}", clip_sample=False)
    assert_same(samplers.ddpm(denoise, x, KEPT, samplers.times(T, steps), variance=variance, noise=noise_from(5)), trajectory(scheduler, x, steps))


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("offset", [0, 1])
def test_ddim(eta, offset):
    x = torch.randn(SHAPE)
    scheduler = reference("diffusers").DDIMScheduler(**OPTIONS, clip_sample=False, set_alpha_to_one=not offset, steps_offset=offset)
    last = float(KEPT[0]) if offset else 1.0
    assert_same(samplers.ddim(denoise, x, KEPT, samplers.times(T, 10, offset=offset), eta=eta, last=last, noise=noise_from(5)),
         trajectory(scheduler, x, 10, eta=eta))


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_dpm_solver(steps, spacing):
    x = torch.randn(SHAPE)
    scheduler = reference("diffusers").DPMSolverMultistepScheduler(**OPTIONS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    at = samplers.times(T, steps, spacing, ends=spacing == "trailing")
    assert at == scheduler.timesteps.tolist()
    assert_same(samplers.dpm(denoise, x, KEPT, at), trajectory(scheduler, x, steps))


def test_plms():
    x = torch.randn(SHAPE)
    scheduler = reference("diffusers").PNDMScheduler(**OPTIONS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    theirs = trajectory(scheduler, x, 10)
    assert_same(samplers.plms(denoise, x, KEPT, samplers.times(T, 10, offset=1), last=float(KEPT[0])), theirs[1:])      # their first is half a step
