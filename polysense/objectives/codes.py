"""Objectives of discrete codes: vector quantisation (VQ-VAE), the relaxed posterior and the pixel likelihood of the discrete VAE (DALL-E)."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.masked import masked_mse


def codebook_loss(encoded: Tensor, chosen: Tensor) -> Tensor:
    """||sg(z_e) - e||^2, mean over all numbers: moves the codebook alone (van den Oord et al. 2017, equation 3, second term)."""
    return F.mse_loss(chosen.float(), encoded.detach().float())


def commitment_loss(encoded: Tensor, chosen: Tensor) -> Tensor:
    """||z_e - sg(e)||^2, mean over all numbers: moves the encoder alone (equation 3, third term, without beta)."""
    return F.mse_loss(encoded.float(), chosen.detach().float())


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of how often each code was used: counts [K] -> scalar in [1, K]; the number of codes in even use that would be as spread."""
    share = counts.float() / counts.float().sum()
    return torch.exp(-torch.special.xlogy(share, share).sum())


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits) from the uniform distribution, in nats: [..., K] -> [...]; 0 where all are equal, log K for a one-hot."""
    log_q = logits.float().log_softmax(-1)
    return (log_q.exp() * log_q).nan_to_num(0.0).sum(-1) + log(logits.shape[-1])


def kl_of_use(logits: Tensor) -> Tensor:
    """KL of the mean softmax over all places from the uniform distribution, in nats: [..., K] -> scalar. Of the mean of `kl_to_uniform` it is the
    part that says how unevenly codes are used; the rest is what a code tells of its place. 0 where all are used alike."""
    return kl_to_uniform(logits.float().log_softmax(-1).flatten(0, -2).logsumexp(0))


def relaxed_codes(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A sample of the Gumbel-softmax distribution: softmax((logits + g) / temperature), [..., K], rows sum to one.

    Soft in the forward and in the backward pass (Ramesh et al. 2021, section 2.1); as the temperature falls to 0 it becomes the one-hot of
    argmax(logits + g), a sample of softmax(logits). Temperature must be positive.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
    gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    return ((logits.float() + gumbel) / temperature).softmax(-1)


def map_pixels(image: Tensor, eps: float = 0.1) -> Tensor:
    """[0, 1] -> [eps, 1 - eps], where the logit-Laplace distribution has no infinities (Ramesh et al. 2021, appendix A.3)."""
    return (1 - 2 * eps) * image + eps


def unmap_pixels(mapped: Tensor, eps: float = 0.1) -> Tensor:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((mapped - eps) / (1 - 2 * eps)).clamp(0, 1)


def logit_laplace(mapped: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """-log density, element by element, of x in (0, 1) whose logit is Laplace(mu, b):

        f(x) = 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b)                     (Ramesh et al. 2021, appendix A.3, equation 2)
    """
    x = mapped.float()
    return (torch.logit(x) - mu.float()).abs() * torch.exp(-log_b.float()) + log_b.float() + log(2) + x.log() + torch.log1p(-x)


def masked_ce(logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of codes: logits [...,K], target int [...], mean over the places where mask [...] (bool) is True, over all without one."""
    if mask is not None:
        logits, target = logits[mask], target[mask]
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


def aligned(said: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """(logits [M,K], features [B,M,D]) of hidden patches against (codes [M], what the encoder says of them [B,M,D]) -> `codes` and `align`, the
    two terms of Chen et al. 2022, CAE, equation 1."""
    return {"codes": masked_ce(said[0], truth[0]), "align": masked_mse(said[1], truth[1])}
