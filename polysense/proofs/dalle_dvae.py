"""Cooling the relaxed codes makes the hard ones decode: a run at constant temperature sees soft mixtures only, and its hard codes lose.

Beside it, mean colours at as many places. Sized on the last 800 training pictures, the weight of the prior with them: ten times as heavy, as the
preset has it, it blurs the codes' choice so much that mean colours were ahead. The score is taken on the set's own test part, which no choice was
made on.
"""
import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import Subset
from polysense.objectives.codes import perplexity
from polysense.pipeline import Pipeline
from polysense.proofs.arms import train_arm
from polysense.proofs.codecs import code_counts, codec_psnr, patch_mean, pictures, psnr, unit
from polysense.proofs.harness import Outcome
from polysense.systems.generate import dalle_dvae

METRIC, HIGHER_IS_BETTER = "mean PSNR (dB) of held-out photographs out of hard codes, 8x8 of 256", True
DATA = "tiny_imagenet40 at 32 px (5,000 train, 800 test)"
STEPS, BETA = 1000, (0.01, 0.03)


def plan(steps: int, end: float) -> Preset:
    return dalle_dvae.tiny().but(**{"stages.0.steps": steps, "config.temperature": (1.0, end), "config.beta": BETA,
                                    "feed.image.size": 32, "feed.train_image.size": 32})


def soft_psnr(subject: Pipeline, images: torch.Tensor) -> float:
    """PSNR of what training sees: relaxed samples at the last temperature."""
    with torch.inference_mode():
        return float(psnr(subject.system.soft(images, torch.Generator().manual_seed(0)), images).mean())


def compare(seed: int, train, test, steps: int = STEPS) -> Outcome:
    cooled, warm = (train_arm("dalle_dvae", plan(steps, end), train, needs=("image",), seed=seed).subject for end in (1 / 16, 1.0))
    held = torch.cat([unit(x, cooled) for x in pictures(test, cooled)])
    hard = {name: codec_psnr(s, test) for name, s in (("cooled", cooled), ("warm", warm))}
    gaps = {f"soft minus hard PSNR, {name}": soft_psnr(s, held[:200]) - codec_psnr(s, test) for name, s in (("cooled", cooled), ("warm", warm))}
    plain = float(psnr(patch_mean(held, 4), held).mean())
    return Outcome(hard["cooled"], {"constant temperature 1": hard["warm"], "mean colour of each patch": plain}, {
        **gaps, "perplexity of the codes": float(perplexity(code_counts(cooled, test)))})


def run(seed: int, part: str = "test") -> Outcome:
    """part "dev": the last 800 training pictures stand in for the test pictures."""
    train = source("tiny_imagenet40")
    if part == "dev":
        return compare(seed, Subset(train, range(len(train) - 800)), Subset(train, range(len(train) - 800, len(train))), STEPS)
    return compare(seed, train, source("tiny_imagenet40", split="test"), STEPS)
