"""Systems that learn to take noise away. Abstract: says how noise is added and how samples are drawn, leaves open what is denoised and why."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.system import Spec, System
from polysense.objectives import samplers
from polysense.objectives.diffusion import SCHEDULES, TARGETS, VARIANCES, betas, kept_share, noise_loss, noised, target, understood

Predict = Callable[[Tensor, Tensor], Tensor]             # x_t [B,...], t [B] -> what the network says, [B,...]


@dataclass(frozen=True, kw_only=True)
class Sampler(Spec):
    """How samples are drawn; may be exchanged at any time: `system.sampler = Sampler(name="dpm")`."""
    name: str = "ddpm"                       # ddpm, ddim, dpm (DPM-Solver++ 2M), plms
    spacing: str = "leading"                 # of the steps over the times: leading, linspace, trailing
    offset: int = 0                          # added to leading times (1 in Stable Diffusion)
    variance: str = "large"                  # ddpm: "large" or "small"
    eta: float = 0.0                         # ddim: 0 without noise, 1 ancestral
    last: str = "one"                        # kept share at the end: "one", or "first": that of time 0 (Stable Diffusion)


class Denoiser(System):
    """A noise schedule, the loss of predicting the noise, and the samplers. See `objectives.diffusion` for both notations of the formulas."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        times: int = 1000                    # T
        schedule: str = "linear"             # linear, scaled_linear, cosine
        low: float = 1e-4                    # beta of the first step and of the last
        high: float = 0.02
        predict: str = "noise"               # what the network says: noise, velocity, start
        sampler: Sampler = field(default_factory=Sampler)
        clip: float | None = 1.0             # while sampling, x_0 is kept within this; None: as it comes (latents)

    kept: Tensor                             # alpha_bar [T]

    def __init__(self, c: Config):
        super().__init__()
        for value, known in ((c.schedule, SCHEDULES), (c.predict, TARGETS), (c.sampler.name, samplers.SAMPLERS), (c.sampler.variance, VARIANCES)):
            if value not in known:
                raise UserError(f"{value!r} is not known", f"choose {', '.join(known)}")
        self.predict, self.sampler, self.clip = c.predict, c.sampler, c.clip
        self.register_buffer("kept", kept_share(betas(c.schedule, c.times, c.low, c.high)).float(), persistent=False)

    def missed(self, x: Tensor, predict: Predict) -> Tensor:
        """How far off `predict` is on x [B,...] at random times with random noise: the simple loss, a scalar (Ho et al. 2020, algorithm 1)."""
        t = torch.randint(len(self.kept), (len(x),), device=x.device)
        noise, kept = torch.randn_like(x), self.kept[t]
        return noise_loss(predict(noised(x, noise, kept), t), target(x, noise, kept, self.predict))

    def drawing(self, x: Tensor, predict: Predict, steps: int, sampler: Sampler | None = None) -> Iterator[Tensor]:
        """Noise x [B,...] -> the sample step by step, the last one finished. Differentiable; without noise of its own but for ddpm and eta > 0.

        Raises UserError for fewer than one step or more than times.
        """
        s = sampler or self.sampler
        if not 1 <= steps <= len(self.kept):
            raise UserError(f"{steps} steps", f"choose between 1 and {len(self.kept)}")

        def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            when = torch.full((len(x),), t, device=x.device)
            start, e = understood(predict(x, when), x, self.kept[t].view(1), self.predict)
            return (start if self.clip is None else start.clamp(-self.clip, self.clip)), e

        kept = self.kept.double().cpu()      # a few hundred scalars: read without waiting for the device
        at = samplers.times(len(kept), steps, s.spacing, s.offset, ends=s.name != "dpm" or s.spacing == "trailing")
        last = 1.0 if s.last == "one" else float(kept[0])
        if s.name == "ddpm":
            return samplers.ddpm(denoise, x, self.kept, at, variance=s.variance)
        if s.name == "ddim":
            return samplers.ddim(denoise, x, kept, at, eta=s.eta, last=last)
        if s.name == "dpm":
            return samplers.dpm(denoise, x, kept, at)
        if s.name == "plms":
            return samplers.plms(denoise, x, kept, at, last=last)
        raise UserError(f"no sampler {s.name!r}", f"the samplers are {', '.join(samplers.SAMPLERS)}")

    def drawn(self, x: Tensor, predict: Predict, steps: int, sampler: Sampler | None = None) -> Tensor:
        """Noise x [B,...] -> samples [B,...]."""
        *_, out = self.drawing(x, predict, steps, sampler)
        return out
