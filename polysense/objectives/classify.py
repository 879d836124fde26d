"""Supervised losses on logits, and mixup."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_ce(logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy, mean over the batch. logits [B,C]; label int [B], or class weights [B,C] that sum to one (mixup).

    `smoothing` e moves e of the target onto the uniform distribution (Szegedy et al. 2016, section 7).
    """
    return F.cross_entropy(logits.float(), label.to(torch.float32) if label.ndim == 2 else label, label_smoothing=smoothing)


def sigmoid_ce(logits: Tensor, tags: Tensor) -> Tensor:
    """Multi-label cross-entropy: sum over classes, mean over the batch (Kolesnikov et al. 2020, BiT). logits, tags [B,C], tags in [0,1]."""
    return F.binary_cross_entropy_with_logits(logits.float(), tags.float(), reduction="none").sum(-1).mean()


def mixup(image: Tensor, label: Tensor, classes: int, alpha: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Zhang et al. 2018, eq. 1: convex mixtures of random pairs. image [B,...], label int [B] -> mixtures [B,...], weights [B,classes].

    One mixing weight a batch, from Beta(alpha, alpha); alpha 0 mixes nothing.
    """
    target = F.one_hot(label, classes).to(torch.float32)
    if alpha <= 0:
        return image, target
    gamma = torch._standard_gamma  # pyright: ignore  (torch.distributions.Beta takes no generator; X / (X + Y) of two gammas is Beta)
    one, two = (float(x) for x in gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator))
    weight = one / (one + two) if one + two > 0 else 1.0
    order = torch.randperm(len(image), generator=generator).to(image.device)
    return weight * image + (1 - weight) * image[order], weight * target + (1 - weight) * target[order]
