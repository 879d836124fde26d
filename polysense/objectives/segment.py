"""What masks are taught with. Shapes: O objects, M masks, S places, all flattened. Masks are given as logits, truths as 0 or 1.

Every function keeps the leading axes and reduces the last one, so that a caller may choose among masks before it averages.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def focal(logits: Tensor, truth: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 5), mean over the places: logits and truth [...,S] -> [...].

    alpha weighs the inside against 1 - alpha outside (below 0: both alike).
    """
    truth = truth.to(logits.dtype)
    plain = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    missed = (logits.sigmoid() - truth).abs()                             # 1 - p of the true side
    weight = alpha * truth + (1 - alpha) * (1 - truth) if alpha >= 0 else 1.0
    return (weight * missed ** gamma * plain).mean(-1)


def dice(logits: Tensor, truth: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - (2 |p t| + smooth) / (|p| + |t| + smooth) (Milletari et al. 2016, with plain sums): logits and truth [...,S] -> [...]."""
    p, truth = logits.sigmoid(), truth.to(logits.dtype)
    return 1 - (2 * (p * truth).sum(-1) + smooth) / (p.sum(-1) + truth.sum(-1) + smooth)


def iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of the thresholded masks, no gradient: logits and truth [...,S] -> [...]; two empty masks agree fully."""
    inside, truth = logits.detach() > 0, truth > 0.5
    both, either = (inside & truth).sum(-1), (inside | truth).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def pick(losses: Tensor, index: Tensor) -> Tensor:
    """The entry `index` [O] of each row of losses [O,M] -> [O]: with index = argmin, gradient goes through the best candidate alone."""
    return losses.gather(1, index[:, None])[:, 0]


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits [O,M,h,w] at another size, bilinear."""
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


def shrunk(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [O,H,W] at a smaller size: bool [O,h,w], True where at least half of a place is inside."""
    return mask if mask.shape[-2:] == size else F.interpolate(mask[:, None].float(), size, mode="area")[:, 0] >= 0.5


def error_point(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """One pixel drawn evenly from where each prediction is wrong (from the truth, where it is nowhere wrong; from everywhere, if that is
    empty too): logits and truth [O,H,W] -> place [O,2] (x y, fractions of the sides, upper left corner of the pixel) and whether it is
    inside [O] (1: missed, 0: added by mistake)."""
    h, w = truth.shape[-2:]
    truth = truth.flatten(1) > 0.5
    wrong = (logits.flatten(1) > 0) != truth
    odds = torch.where(wrong.any(1, keepdim=True), wrong, torch.where(truth.any(1, keepdim=True), truth, True))
    at = torch.multinomial(odds.float(), 1)
    place = torch.cat([at % w / w, at // w / h], 1)
    return place, truth.gather(1, at)[:, 0].long()


def boxes_of(mask: Tensor) -> Tensor:
    """The extents of masks [O,H,W] as x0 y0 x1 y1 in [0,1], [O,4]; zeros for an empty one."""
    out: list[Tensor] = []
    for axis in (1, 2):
        seen = mask.any(axis)                                             # columns, then rows
        n = seen.shape[1]
        step = torch.arange(n, device=mask.device)
        low = torch.where(seen, step, n).min(1).values
        high = torch.where(seen, step + 1, 0).max(1).values
        out.append(torch.stack([torch.where(high > 0, low, 0), high], 1) / n)
    return torch.stack([out[0][:, 0], out[1][:, 0], out[0][:, 1], out[1][:, 1]], 1)


def jittered(boxes: Tensor, share: float, most: float) -> Tensor:
    """boxes [O,4] whose corners are moved by normal noise of `share` of the side, at most `most` (a fraction of the picture), kept inside."""
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return (boxes + (torch.randn_like(boxes) * share * side).clamp(-most, most)).clamp(0, 1)
