"""DDPM: pictures out of noise, by a network that learned to take noise away.

A picture x_0 in [-1, 1] is drowned in noise over T steps. One step is x_t = a_t x_{t-1} + b_t e_t with a_t^2 + b_t^2 = 1; all steps up to t
together are

    x_t = A_t x_0 + B_t e,      A_t = a_1 a_2 ... a_t,  B_t = sqrt(1 - A_t^2),  e ~ N(0, I)                     (equation 4)

so that A_T is nearly 0 and x_T is noise. In the paper's letters a_t = sqrt(1 - beta_t), b_t = sqrt(beta_t), A_t = sqrt(alpha_bar_t). A U-Net
eps(x_t, t) learns the total noise e from x_t, at times drawn uniformly, without the weight that the variational bound would give:

    L = || e - eps(A_t x_0 + B_t e, t) ||^2                                                                    (equation 14)

The noise e_t of the last step alone is (b_t / B_t) e; in its terms one step back is (x_t - b_t eps_theta) / a_t + sigma_t z, in those of e

    x_{t-1} = (x_t - (b_t^2 / B_t) eps(x_t, t)) / a_t + sigma_t z,   z ~ N(0, I), z = 0 at the end             (algorithm 2)

with sigma_t^2 = b_t^2 ("large") or b_t^2 B_{t-1}^2 / B_t^2 ("small"). A moving average of the weights is what draws. `objectives.diffusion` has
the formulas, `objectives.samplers` also the faster DDIM and DPM-Solver++: `system.sampler = Sampler(name="dpm")`.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from polysense.archetypes.denoiser import Denoiser, Sampler
from polysense.base.card import Card
from polysense.base.errors import UserError
from polysense.base.system import Batch, Feed, ImagePlan, Losses, Optim, Preset, Stage, ViewPlan, final
from polysense.nn.norm import GroupNorm
from polysense.nn.spatial import ResBlock, SpatialAttention
from polysense.nn.time import SinusoidalTime
from polysense.nn.unet import Level, UNet
from polysense.weights import ddpm_diffusers

card = Card(
    name="DDPM", paper="Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020",
    arxiv="2006.11239", year=2020, says="Generates pictures by removing noise step by step.",
    needs=("image",), can=("sample_image",), official="hojonathanho/diffusion",
)

PARAMETERS = 35_746_307                      # the paper says 35.7M for CIFAR-10


@final
class DDPM(Denoiser):
    @dataclass(frozen=True, kw_only=True)
    class Config(Denoiser.Config):
        unet: UNet.Config
        size: int                            # side of the pictures that it draws, pixels

    def __init__(self, c: Config):
        super().__init__(c)
        self.unet, self.size = c.unet.build(), c.size

    def losses(self, batch: Batch) -> Losses:
        return Losses(noise=self.missed(batch["image"], self.unet))

    @torch.no_grad()
    def sample_image(self, count: int, *, steps: int) -> Tensor:
        """-> [count,3,size,size] in [-1,1]. steps: 1 to T; T is the paper's sampling, fewer are spaced evenly."""
        if count < 1:
            raise UserError(f"{count} pictures", "ask for at least one")
        return self.drawn(torch.randn(count, self.unet.channels, self.size, self.size, device=self.device), self.unet, steps)


def unet(widths: tuple[int, ...], seeing: tuple[int, ...], *, depth: int = 2, heads: int = 1, groups: int = 32, dropout: float = 0.0) -> UNet.Config:
    """A U-Net of one width a level, with attention at the levels `seeing`."""
    norm = GroupNorm.Config(groups=groups, eps=1e-6)
    attn = SpatialAttention.Config(heads=heads, norm=norm)
    return UNet.Config(levels=tuple(Level(width=w, depth=depth, attn=attn if i in seeing else None) for i, w in enumerate(widths)), mid=attn,
                       block=ResBlock.Config(norm=norm, dropout=dropout), time=SinusoidalTime.Config(shift=1.0, order="sin cos"), pad="end")


def preset(size: int, net: UNet.Config, data: str, stage: Stage, sampler: Sampler, flip: float) -> Preset:
    return Preset(
        data=data, stages=(stage,), config=DDPM.Config(unet=net, size=size, sampler=sampler),
        feed=Feed(image=ImagePlan(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
                  train_image=ViewPlan(size=size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip)))


def tiny() -> Preset:
    """0.7M parameters on small rendered things."""
    return preset(16, unet((32, 64), (1,), depth=1, groups=8), "scenes:single?style=plain&size=32", Stage(
        objective=DDPM.losses, steps=1500, batch_size=64, ema=0.995, optim=Optim(lr=1e-3, warmup=50, clip=1.0)), Sampler(variance="small"), 0.0)


def paper() -> Preset:
    """CIFAR-10 at 32x32 (appendix B)."""
    return preset(32, unet((128, 256, 256, 256), (1,), dropout=0.1), "cifar10", Stage(
        objective=DDPM.losses, steps=800_000, batch_size=128, ema=0.9999,
        optim=Optim(name="adam", lr=2e-4, schedule="constant", warmup=5000, clip=1.0)), Sampler(), 0.5)


def paper256() -> Preset:
    """CelebA-HQ and LSUN at 256x256 (appendix B): 114M parameters."""
    return preset(256, unet((128, 128, 256, 256, 512, 512), (4,)), "celeba_hq", Stage(
        objective=DDPM.losses, steps=500_000, batch_size=64, ema=0.9999,
        optim=Optim(name="adam", lr=2e-5, schedule="constant", warmup=5000, clip=1.0)), Sampler(), 0.5)


weights = {"diffusers": ddpm_diffusers.LAYOUT}
