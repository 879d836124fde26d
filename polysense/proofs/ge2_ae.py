"""Ge2-AE draws hidden patches of unseen photographs with more of their high frequencies than MAE of the same encoder, seeds and steps.

The score: log-spectra of the reconstructed pictures (visible patches as they are) against those of the true ones, averaged over rings of equal
frequency, mean absolute difference over the upper half of the rings. The error of hidden pixels of both is noted, it should not be much worse.
Sizes are a first guess.
"""
import torch
from torch import Tensor

from polysense.nn.fourier import spectrum
from polysense.proofs.arms import Arm
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import learned, photos
from polysense.systems.selfsup import ge2_ae, mae

METRIC = "error of the log-spectrum of drawn photographs of 64 px in the upper half of the frequencies, 250 steps of 64"
HIGHER_IS_BETTER = False
DATA = "tiny_imagenet40 (4,000 training photographs of 64 px, 800 unseen)"


def rings(image: Tensor) -> Tensor:
    """image [B,C,H,W] -> [B,C,H/2]: mean log power of each ring of frequencies, low ones first."""
    real, imaginary = spectrum(image).chunk(2, 1)
    power = (real.square() + imaginary.square() + 1e-6).log()
    side = image.shape[-1]
    at = torch.arange(side) - side // 2
    ring = torch.hypot(at[:, None].float(), at.float()).round().long().clamp(max=side // 2 - 1).flatten()
    total = power.new_zeros(*power.shape[:2], side // 2).index_add_(2, ring, power.flatten(2))
    return total / torch.bincount(ring, minlength=side // 2)


@torch.inference_mode()
def judged(arm: Arm, image: Tensor, seed: int) -> tuple[float, float]:
    """(error of the upper half of the rings, mean squared error of hidden pixels)."""
    system, high, pixels = arm.subject.system, 0.0, 0.0
    torch.manual_seed(seed)
    for some in image.split(100):
        masking = system.masking(some)
        drawn = system.reconstruct(some, masking)
        share, half = len(some) / len(image), image.shape[-1] // 4
        high += float((rings(drawn) - rings(some))[..., half:].abs().mean()) * share
        pixels += float((drawn - some).square().mean()) / float(masking.mask.float().mean()) * share
    return high, pixels


def run(seed: int) -> Outcome:
    image, unseen, _ = photos(mae.tiny(), 4000, seed)
    both = {name: learned(name, recipe.tiny(), image, 250, seed) for name, recipe in (("ge2_ae", ge2_ae), ("mae", mae))}
    (high, pixels), (plain_high, plain_pixels) = (judged(arm, unseen, seed) for arm in both.values())
    return Outcome(high, {"MAE": plain_high}, {"squared error of hidden pixels": pixels, "squared error of hidden pixels, MAE": plain_pixels})
