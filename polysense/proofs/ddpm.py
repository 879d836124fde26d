"""Removing noise step by step draws better digits than a variational auto-encoder's prior, and than removing all of it at once.

Sized on the last 2,000 training pictures as stand-in for test pictures; the score is taken on the set's own test part, which no choice was made
on. The auto-encoder is a convolutional one with 16 latents, trained for as many steps of twice as many pictures.
"""
import torch
from torch import Tensor, nn

from polysense.archetypes.denoiser import Sampler
from polysense.base.plan import Feed
from polysense.base.system import Preset
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Source, Subset
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.generate import ddpm
from polysense.tasks.generation import fid, seen_by, teach

METRIC, HIGHER_IS_BETTER = "FID of 300 digits drawn in 40 steps (features of a small classifier of real ones)", False
DATA = "mnist at 16 px (30,000 train, 4,000 test)"
STEPS, BATCH, COUNT = 1500, 32, 300


def plan(steps: int) -> Preset:
    return ddpm.tiny().but(**{"stages.0.steps": steps, "stages.0.batch_size": BATCH, "stages.0.optim.lr": 2e-3, "stages.0.ema": 0.98})


class VAE(nn.Module):
    """16 x 16 -> 16 numbers -> 16 x 16, Gaussian both ways (Kingma & Welling 2014)."""

    def __init__(self, width: int = 64, latents: int = 16):
        super().__init__()
        down, up = [nn.Conv2d(3, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1)], [nn.Upsample(scale_factor=2.0), nn.SiLU()]
        self.see = nn.Sequential(*down, nn.SiLU(), nn.Flatten(), nn.Linear(width * 16, 2 * latents))
        self.draw = nn.Sequential(nn.Linear(latents, width * 16), nn.Unflatten(1, (width, 4, 4)), nn.Conv2d(width, width, 3, 1, 1), *up,
                                  nn.Conv2d(width, width, 3, 1, 1), *up, nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh())
        self.latents, self.noise = latents, nn.Parameter(torch.zeros(()))

    def loss(self, x: Tensor) -> Tensor:
        mean, log = self.see(x).chunk(2, 1)
        out = self.draw(mean + (0.5 * log).exp() * torch.randn_like(mean))
        spread = (x[0].numel() * (self.noise + 0.5 * (out - x).square() * (-2 * self.noise).exp()).mean((1, 2, 3)))
        return (spread + 0.5 * (mean.square() + log.exp() - 1 - log).sum(1)).mean()


def prior_samples(train: Source, feed: Feed, seed: int, steps: int, batch_size: int) -> Tensor:
    """Pictures decoded from the prior of a VAE trained for so many steps."""
    torch.manual_seed(seed)
    vae = VAE()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    for _, batch in zip(range(steps), Loader(train, feed, None, batch_size=batch_size, seed=seed, needs=("image",))):
        loss = vae.loss(batch["image"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1e3)
        optimizer.step()
    with torch.no_grad():
        return vae.draw(torch.randn(COUNT, vae.latents))


def compare(seed: int, train: Source, test: Source, steps: int = STEPS) -> Outcome:
    subject = train_arm("ddpm", plan(steps), train, needs=("image",), seed=seed).subject
    system, feed = subject.system, subject.preset.feed
    assert feed.image is not None
    judge = teach(train, feed.image, steps=250)
    held = torch.cat([b["image"] for b in Loader(test, feed, None, batch_size=250, train=False, needs=("image",))])
    real = seen_by(judge, held)[0]

    def scored(drawn: Tensor) -> tuple[float, float]:
        """Its distance, and the share of pictures that show some digit clearly."""
        features, chance = seen_by(judge, drawn)
        return fid(features, real), float((chance.max(1) > 0.9).mean())

    def drawn(steps: int, sampler: Sampler) -> Tensor:
        torch.manual_seed(seed)
        usual, system.sampler = system.sampler, sampler
        out = torch.cat([system.sample_image(100, steps=steps) for _ in range(COUNT // 100)])
        system.sampler = usual
        return out

    own, sure = scored(drawn(40, Sampler(variance="small")))
    once, sure_once = scored(drawn(1, Sampler(name="ddim", spacing="trailing")))
    prior, sure_prior = scored(prior_samples(train, feed, seed, steps, 2 * BATCH))
    fast, long = (scored(drawn(n, Sampler(name=name)))[0] for name, n in (("dpm", 15), ("ddim", 40)))
    return Outcome(own, {"prior samples of a VAE": prior, "one step from pure noise": once}, {
        "confident (p > 0.9)": sure, "confident, VAE": sure_prior, "confident, one step": sure_once, "confident, real": scored(held)[1],
        "FID of as many real pictures": scored(held[:COUNT])[0], "FID of DPM-Solver++ in 15 steps": fast, "FID of DDIM in 40 steps": long})


def run(seed: int, part: str = "test") -> Outcome:
    """part "dev": the last 2,000 training pictures stand in for the test pictures."""
    train = source("mnist")
    if part == "dev":
        return compare(seed, Subset(train, range(len(train) - 2000)), Subset(train, range(len(train) - 2000, len(train))), STEPS)
    return compare(seed, train, source("mnist", split="test"), STEPS)
