"""A learned codebook keeps more of a photograph than one code, than mean colours at as many places, and than k-means on the raw patches.

Sized on the last 800 training pictures; the score is taken on the set's own test part, which no choice was made on.
"""
import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.objectives.codes import perplexity
from polysense.proofs.arms import Arm, some_of, train_arm
from polysense.proofs.codecs import code_counts, codec_psnr, kmeans_psnr, patch_mean, pictures, psnr, unit
from polysense.proofs.harness import Outcome
from polysense.systems.generate import vq_vae

METRIC, HIGHER_IS_BETTER = "mean PSNR (dB) of held-out photographs out of 16x16 codes", True
DATA = "tiny_imagenet40 at 64 px (5,000 train, 800 test); 256 codes"
STEPS = 800


def plan(codes: int, steps: int) -> Preset:
    """The codec stage alone."""
    tiny = vq_vae.tiny()
    return tiny.but(stages=tiny.stages[:1]).but(**{"stages.0.steps": steps, "config.codec.quantizer.codes": codes, "config.prior.codes": codes})


def compare(seed: int, train, test, steps: int = STEPS) -> Outcome:
    def arm(codes: int, steps: int) -> Arm:
        return train_arm("vq_vae", plan(codes, steps), train, needs=("image",), seed=seed)

    subject = arm(256, steps).subject
    seen = torch.cat([unit(x, subject) for x in pictures(some_of(train, 1500, seed), subject)])
    held = torch.cat([unit(x, subject) for x in pictures(test, subject)])
    used = float(perplexity(code_counts(subject, test)))
    return Outcome(codec_psnr(subject, test), {
        "a codebook of one code": codec_psnr(arm(1, steps // 8).subject, test),
        "mean colour of each patch": float(psnr(patch_mean(held, 4), held).mean()),
        "k-means on raw patches": kmeans_psnr(seen, held, 4, 256, seed)}, {"perplexity on the test part (of 256)": used})


def run(seed: int) -> Outcome:
    return compare(seed, source("tiny_imagenet40"), source("tiny_imagenet40", split="test"))
