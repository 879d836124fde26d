"""Losses between two views where one side has no gradient: keys of a queue, keys of the batch, a teacher's distribution.

On several ranks each computes its own rows; the mean over ranks is the loss of the global batch (see spread.py).
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.spread import gather, places


def exact(x: Tensor) -> torch.autocast:
    """Products in the type of their factors, autocast or not: divided by a low temperature, rounding would show."""
    return torch.autocast(x.device.type, enabled=False)


def queue_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Each query against its own key and the keys of a queue [K,D]: cross-entropy of [q.k+, q.queue] / temperature with label 0 (He et al. 2020,
    MoCo, equation 1). query, key unit-norm [B,D]; key and queue get no gradient. Scalar."""
    query, key = query.float(), key.detach().float()
    with exact(query):
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.detach().float().T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def batch_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Each query against the keys of all ranks' batches, its own is the positive, times 2 temperature (Chen et al. 2021, MoCo v3, algorithm 1).

    query, key unit-norm [B,D]; key gets no gradient. Scalar.
    """
    at = places(query)
    with exact(query):
        logits = query.float() @ gather(key.detach().float(), at).T / temperature
    label = at.start + torch.arange(len(query), device=query.device)
    return 2 * temperature * F.cross_entropy(logits, label, reduction="sum") / at.share


def distil_ce(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Every target view against every student view but itself: the mean of the cross-entropies H(target_i, softmax(student_j / temperature)), i != j
    (Caron et al. 2021, DINO, equation 3).

    student logits [V,B,K]; target probabilities [T,B,K] of its first T views, without gradient. T V - T terms. Scalar.
    """
    log_p, target = F.log_softmax(student.float() / temperature, -1), target.detach().float()
    with exact(student):
        cross = -torch.einsum("ibk,jbk->ij", target, log_p) / student.shape[1]
    other = ~torch.eye(len(target), len(student), dtype=torch.bool, device=student.device)
    return cross[other].mean()


def masked_ce(student: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """H(target, softmax(student / temperature)) at hidden patches: the mean over the hidden patches of a picture, then over pictures, where one that
    hides nothing counts as zero (Zhou et al. 2022, iBOT, equation 2).

    student logits and target probabilities [M,K] at the True places of mask [B,N], in its order; the target gets no gradient. Scalar.
    """
    hidden = mask.sum(1)
    weight = (1 / hidden.clamp(min=1))[:, None].expand_as(mask)[mask]
    with exact(student):
        cross = -(target.detach().float() * F.log_softmax(student.float() / temperature, -1)).sum(-1)
    return (cross * weight).sum() / len(mask)


def koleo(x: Tensor) -> Tensor:
    """-mean log of the distance of each x / |x| to its nearest other one: spreads features evenly (Sablayrolles et al. 2019; Oquab et al. 2024).

    x [B,D], in float32; neighbours are those of the rank's own batch. 0 for fewer than two samples. Scalar.
    """
    x = F.normalize(x.float(), dim=-1)
    if len(x) < 2:
        return x.sum() * 0
    with torch.no_grad(), exact(x):
        near = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(x, x[near], eps=1e-8) + 1e-8).log().mean()


def mirror_cosine(one: Tensor, two: Tensor, target_one: Tensor, target_two: Tensor) -> Tensor:
    """-(cos(one, target_two) + cos(two, target_one)) / 2, mean over the batch; the targets get no gradient (Chen & He 2021, SimSiam, equations 1
    to 4). one, two: predictions from each view [B,D]; the targets: its projections. Scalar, in [-1, 1]."""
    return -(F.cosine_similarity(one.float(), target_two.detach().float(), dim=-1).mean()
             + F.cosine_similarity(two.float(), target_one.detach().float(), dim=-1).mean()) / 2
