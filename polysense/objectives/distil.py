"""Learning from a teacher's probabilities in place of, or beside, hard targets."""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.matching import similarities


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_c target_c log softmax(logits)_c over the last axis: [..., C] -> [...]. KL(target || softmax) plus the entropy of the target."""
    return -(target * F.log_softmax(logits.float(), -1)).sum(-1)


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy against what the teacher decides, argmax over classes (Touvron et al. 2021, equation 3). logits, teacher [B,C]. Scalar."""
    return F.cross_entropy(logits.float(), teacher.argmax(-1))


def soft_distillation(logits: Tensor, teacher: Tensor, temperature: float = 3.0, per: str = "number") -> Tensor:
    """t^2 KL(softmax(teacher / t) || softmax(logits / t)) (Hinton et al. 2015; Touvron et al. 2021, equation 2). logits, teacher [B,C]. Scalar.

    The sum over samples and classes is divided by their `number`, batch times classes, as in the code of DeiT, or by the "batch" alone. Raises
    ValueError for another divisor.
    """
    if per not in ("number", "batch"):
        raise ValueError(f"per={per!r} is neither 'number' nor 'batch'")
    one, two = ((x.float() / temperature).log_softmax(-1) for x in (logits, teacher.detach()))
    total = F.kl_div(one, two, reduction="sum", log_target=True) * temperature ** 2
    return total / (logits.numel() if per == "number" else len(logits))


def distilled_contrast(feature: Tensor, keys: Tensor, teacher: Tensor, scale: Tensor | float, alpha: Tensor | float) -> Tensor:
    """InfoNCE against a long list of keys whose targets are softened by a momentum teacher (Li et al. 2021, ALBEF, equations 1 and 6). Scalar.

    feature [B,D] unit-norm of one modality; keys [K,D], of the other, by the teacher: the first B belong to the batch, the rest come from a
    queue; teacher [B,D]: the teacher's view of what `feature` shows. With y the one-hot pairs and q = softmax(scale * teacher @ keys.T),
    the target is (1 - alpha) y + alpha q; alpha = 0 is plain InfoNCE. No gradient reaches keys or teacher.
    """
    if feature.shape != teacher.shape or len(keys) < len(feature):
        raise ValueError(f"{tuple(feature.shape)} features, {tuple(teacher.shape)} of the teacher and {tuple(keys.shape)} keys do not go together")
    keys = keys.detach()
    with torch.no_grad():
        target = alpha * similarities(teacher, keys, scale).softmax(1)
        target.diagonal().add_(1 - alpha)
    return soft_cross_entropy(similarities(feature, keys, scale), target).mean()


def distilled_words(logits: Tensor, word: Tensor, teacher: Tensor | None = None, alpha: Tensor | float = 0.0) -> Tensor:
    """Masked language modelling, mean over the hidden words: (1 - alpha) CE(word) + alpha CE(softmax(teacher)) (Li et al. 2021, equation 7).

    logits and teacher [N,V] at the hidden words alone, word [N] what stood there. No hidden word costs nothing. Scalar.
    """
    loss = F.cross_entropy(logits.float(), word, reduction="none")
    if teacher is not None:
        loss = (1 - alpha) * loss + alpha * soft_cross_entropy(logits, teacher.detach().float().softmax(-1))
    return loss.sum() / max(1, len(loss))
