"""How a representation is doing, in single numbers that nobody minimises: whether it is collapsing shows here before it shows in a score.

Features are [B,D], of any length: what is looked at are their directions. All are computed without a graph, in float32.
"""
# torch is typed in part only, hence (strict mode would refuse what torch itself leaves open):
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives.codes import perplexity

ROWS = 512                                   # at most so many samples are looked at


def _directions(x: Tensor) -> Tensor:
    return F.normalize(x[:ROWS].detach().float(), dim=-1)


@torch.no_grad()
def feature_spread(x: Tensor) -> Tensor:
    """sqrt(D) times the standard deviation over the batch of each channel of x / |x|, mean over channels (Chen & He 2021, SimSiam, section 4.1).

    1 for directions that are spread evenly, 0 for features that are all alike. Scalar.
    """
    return _directions(x).std(0, correction=0).mean() * x.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(x: Tensor) -> Tensor:
    """exp(entropy of the shares of the singular values) of the centred directions (Roy & Vetterli 2007): how many dimensions the features fill,
    between 1 and min(B - 1, D); 0 where they are all alike. Scalar."""
    x = _directions(x)
    x = (x - x.mean(0)).double()
    value = torch.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x).clamp(min=0).sqrt()
    if float(value.sum()) < 1e-6:
        return value.new_zeros((), dtype=torch.float32)
    return perplexity(value)


@torch.no_grad()
def alignment(one: Tensor, two: Tensor) -> Tensor:
    """Mean squared distance of the two views of a picture on the sphere, in [0, 4] (Wang & Isola 2020, section 4.1). Scalar."""
    return (_directions(one) - _directions(two)).square().sum(-1).mean()


@torch.no_grad()
def uniformity(x: Tensor) -> Tensor:
    """log mean exp(-2 |x_i - x_j|^2) over pairs of different samples: 0 where all are alike, about -4 on an even sphere (section 4.2). Scalar."""
    x = _directions(x)
    apart = 2 - 2 * (x @ x.T)[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
    return (-2 * apart).logsumexp(0) - log(max(1, len(apart)))


@torch.no_grad()
def of_pairs(one: Tensor, two: Tensor) -> dict[str, Tensor]:
    """All that can be said of the features of two views of the same pictures, by the names that logs and reports know."""
    return {"feature_spread": feature_spread(one), "effective_rank": effective_rank(one), "alignment": alignment(one, two),
            "uniformity": uniformity(one)}


@torch.no_grad()
def of_answers(answer: Tensor) -> dict[str, Tensor]:
    """Of a teacher's distributions [N,K]: `teacher_entropy`, their mean entropy in nats; `teacher_certainty`, log K less that, 0 for a teacher that
    says nothing; `answers_used`, the perplexity of their mean: 1 for a teacher that says the same of everything and is sure of it."""
    answer = answer.detach().float()
    entropy = -torch.special.xlogy(answer, answer).sum(-1).mean()
    return {"teacher_entropy": entropy, "teacher_certainty": log(answer.shape[-1]) - entropy, "answers_used": perplexity(answer.mean(0))}


@torch.no_grad()
def of_codes(ids: Tensor, codes: int) -> dict[str, Tensor]:
    """Of the codes that a batch was given: the perplexity of their use, and its share of the codebook."""
    used = perplexity(torch.bincount(ids.flatten(), minlength=codes))
    return {"codes_used": used, "share_of_codes": used / codes}
