"""Contrastive losses over all pairs of a batch, exact, in memory linear in the batch (see tiled.py), over all ranks under `spread`.

Features are [B, D]. On several ranks each computes its own rows against everyone's columns, in both directions; the mean over ranks of
what they return is the loss of the global batch (see spread.py). Differentiable once.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.spread import gather, places
from polysense.objectives.tiled import log_sum_exp, sum_softplus


def info_nce(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric cross-entropy over in-batch pairs; image, text unit-norm [B,D]; scale = 1 / temperature. Scalar.

    Radford et al. 2021 (CLIP), figure 3: `(CE(scale * image @ text.T, i) + CE(scale * text @ image.T, i)) / 2`.
    """
    _check(image, text)
    at = places(image)
    if len(at.sizes) == 1:                   # one tile serves both directions
        rows, columns, pairs = log_sum_exp(image, text, scale, columns=True, pair=0)
        return ((rows + columns) / 2 - pairs).mean()
    images, texts = gather(image, at), gather(text, at)
    see, _, seen = log_sum_exp(image, texts, scale, pair=at.start)
    say, _, said = log_sum_exp(text, images, scale, pair=at.start)
    return ((see - seen).sum() + (say - said).sum()) / (2 * at.share)


def one_way_nce(query: Tensor, key: Tensor, scale: Tensor | float, queue: Tensor | None = None) -> Tensor:
    """Each query against its own key among the keys of the global batch, and those of a `queue` [N,D] where there is one: the rows of `info_nce`
    alone. query, key unit-norm [B,D]. Scalar.

    With a queue it is MoCo's loss whose negatives are also the batch; with nearest neighbours as keys, DeCLIP's (Li et al. 2022, equation 7).
    """
    _check(query, key)
    at = places(query)
    keys = gather(key, at)
    keys = keys if queue is None else torch.cat([keys, queue.detach().to(keys.dtype)])
    rows, _, pairs = log_sum_exp(query, keys, scale, pair=at.start)
    return (rows - pairs).sum() / at.share


@torch.no_grad()
def nearest(query: Tensor, keys: Tensor, block: int = 1024) -> Tensor:
    """query [B,D], keys [N,D] of unit norm -> the nearest key of each [B,D], without a graph; no more than block x N products exist at a time."""
    return torch.cat([keys[(q.to(keys.dtype) @ keys.T).argmax(1)] for q in query.split(block)])


def nt_xent(one: Tensor, two: Tensor, temperature: Tensor | float) -> Tensor:
    """Chen et al. 2020 (SimCLR), eq. 1: each of the 2B views against its partner among the other 2B - 1 views. Scalar.

    one, two [B,D] of any length: the similarity is the cosine. Negatives come from the global batch; a view never meets itself.
    """
    _check(one, two)
    one, two = F.normalize(one, dim=-1), F.normalize(two, dim=-1)
    at = places(one)
    everyone = torch.cat([gather(one, at), gather(two, at)])
    first, second = at.start, at.total + at.start
    scale = 1 / temperature
    ones, _, met = log_sum_exp(one, everyone, scale, pair=second, hide=first)
    twos, _, back = log_sum_exp(two, everyone, scale, pair=first, hide=second)
    return ((ones - met).sum() + (twos - back).sum()) / (2 * at.share)


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Zhai et al. 2023 (SigLIP), algorithm 1: every pair is its own yes-or-no question; summed over pairs, divided by B. Scalar.

    image, text unit-norm [B,D]; `-sum_ij log sigmoid(z_ij (scale * image_i . text_j + bias)) / B`, z = 1 on the diagonal, else -1.
    """
    _check(image, text)
    at = places(image)
    return sum_softplus(image, gather(text, at), scale, bias, pair=at.start) / at.share


def apart(label: Tensor) -> Tensor:
    """label [B], negative where a sample belongs to no class -> the same with a number of its own, which no other sample of the global batch
    and no class has, in place of each negative one."""
    at = places(label)
    return torch.where(label < 0, -1 - at.start - torch.arange(len(label), device=label.device), label)


def multi_positive(image: Tensor, text: Tensor, scale: Tensor | float, label: Tensor, text_label: Tensor | None = None) -> Tensor:
    """Label-aware contrast: all texts with the label of an image are its positives, equally, and the other way round. Scalar.

    Yang et al. 2022 (UniCL), eqs. 2-4; the form of Khosla et al. 2020 (SupCon), eq. 2, across two modalities: per row
    `log-sum-exp - mean over positives of the logit`, mean over rows, mean of both directions. image, text unit-norm [B,D], label and
    text_label integer [B] (text_label None: the same). With labels all different it is `info_nce`. A row without a positive in the
    global batch is left out.
    """
    _check(image, text)
    text_label = label if text_label is None else text_label
    if label.shape != image.shape[:1] or text_label.shape != text.shape[:1]:
        raise ValueError(f"labels should be [{len(image)}]: got {tuple(label.shape)} and {tuple(text_label.shape)}")
    at = places(image)
    images, texts = gather(image, at), gather(text, at)
    names, number = torch.unique(torch.cat([gather(label, at), gather(text_label, at)]), return_inverse=True)
    image_class, text_class = number[:at.total], number[at.total:]
    if len(at.sizes) == 1:
        rows, columns, _ = log_sum_exp(image, text, scale, columns=True)
    else:
        rows, columns = log_sum_exp(image, texts, scale)[0], log_sum_exp(text, images, scale)[0]
    mine, ranks = slice(at.start, at.start + len(image)), len(at.sizes)
    return (_beyond_positives(rows, image, image_class, texts, text_class, scale, len(names), mine, ranks)
            + _beyond_positives(columns, text, text_class, images, image_class, scale, len(names), mine, ranks)) / 2


def _beyond_positives(lse: Tensor, own: Tensor, own_class: Tensor, other: Tensor, other_class: Tensor, scale: Tensor | float, classes: int,
                      mine: slice, ranks: int) -> Tensor:
    """Mean over rows with a positive of `lse - scale * own . (mean of the positives)`: class means make it linear in the batch."""
    other = other.to(lse.dtype)
    count = torch.bincount(other_class, minlength=classes)
    centre = other.new_zeros(classes, other.shape[1]).index_add(0, other_class, other) / count.clamp(min=1)[:, None]
    has = count[own_class] > 0
    loss = (lse - scale * (own.to(lse.dtype) * centre[own_class[mine]]).sum(-1)) * has[mine]
    return loss.sum() / (has.sum().clamp(min=1) / ranks)


def _check(one: Tensor, two: Tensor) -> None:
    if one.shape != two.shape or one.ndim != 2:
        raise ValueError(f"pairs should be two tensors [B, D] of one shape: got {tuple(one.shape)} and {tuple(two.shape)}")
