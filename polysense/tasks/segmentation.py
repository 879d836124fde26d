"""Interactive segmentation (Kirillov et al. 2023, section 7.1): the overlap with the true mask after 1, 3 and 5 simulated clicks.

The first click is the place of the object farthest from its border, each next one the place of the largest error farthest from that error's
border, inside or outside as the truth says; from the second round on the system gets its best answer back as a mask prompt. "oracle" takes
the best of the candidates in place of the one that the system itself thinks best: the rest of the gap is ambiguity.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.data.loader import Loader
from polysense.tasks.encode import Progress, frozen, name_of
from polysense.tasks.result import Result, grouped_mean_of, metric


def run(subject: Any, test: Any, *, clicks: Sequence[int] = (1, 3, 5), seed: int = 0, batch_size: int = 16,
        progress: Progress | None = None) -> Result:
    """Mean IoU over the objects of all pictures. `clicks`: after how many of them it is measured."""
    if not clicks or min(clicks) < 1:
        raise UserError(f"clicks={tuple(clicks)} leaves nothing to measure", "give numbers of clicks from 1 on")
    loader = Loader(test, subject.preset.feed, None, batch_size=batch_size, train=False, needs=("image", "mask"))
    found: dict[str, list[Tensor]] = {}
    group, done = [], 0
    with frozen(subject.system):
        for batch in loader:
            mask = batch["mask"]
            there = mask.flatten(2).any(-1)
            if there.any():
                for name, value in play(subject, batch["image"], mask, max(clicks)).items():
                    found.setdefault(name, []).append(value[there])
                group.append(there.nonzero()[:, 0] + done)
            done += len(mask)
            if progress:
                progress(done, len(test))
    if not group:
        raise UserError(f"no picture of {test.name!r} has a mask", "use data with masks, such as scenes:nested")
    of = np.unique(torch.cat(group).numpy(), return_inverse=True)[1]
    wanted = [f"oracle@{min(clicks)}", *(f"iou@{k}" for k in clicks)]
    metrics = {name: metric(grouped_mean_of(torch.cat(found[name]).double().numpy(), of, of.max() + 1), int(of.max()) + 1, seed=seed)
               for name in wanted}
    notes = {"objects": len(of)} | ({"skipped": [list(s) for s in loader.skipped]} if loader.skipped else {})
    return Result("clicks", name_of(subject), test.name, int(of.max()) + 1, metrics, notes=notes)


def play(subject: Any, image: Tensor, mask: Tensor, clicks: int) -> dict[str, Tensor]:
    """image [B,3,H,W], mask [B,N,H,W] -> `iou@k` and `oracle@k` [B,N] for k from 1 to `clicks`."""
    image, truth, size = image.to(subject.device), mask.to(subject.device), (mask.shape[-2], mask.shape[-1])
    answer, previous, out = torch.zeros_like(truth), None, dict[str, Tensor]()
    points, label = truth.new_zeros((*truth.shape[:2], 0, 2), dtype=torch.float), truth.new_zeros((*truth.shape[:2], 0), dtype=torch.long)
    for k in range(1, clicks + 1):
        place, inside = next_click(answer.flatten(0, 1), truth.flatten(0, 1))
        points = torch.cat([points, place.unflatten(0, truth.shape[:2])[:, :, None]], 2)
        label = torch.cat([label, inside.unflatten(0, truth.shape[:2])[:, :, None]], 2)
        logits, score = subject.system.segment(image, points, label, None, previous)
        best = score.argmax(-1)[..., None, None, None]
        full = F.interpolate(logits.flatten(0, 1), size, mode="bilinear", align_corners=False).unflatten(0, truth.shape[:2]) > 0
        overlap = (full & truth[:, :, None]).flatten(3).sum(-1) / (full | truth[:, :, None]).flatten(3).sum(-1).clamp(min=1)
        out[f"iou@{k}"], out[f"oracle@{k}"] = overlap.gather(2, best[..., 0, 0])[..., 0].cpu(), overlap.amax(2).cpu()
        answer = full.gather(2, best.expand(-1, -1, 1, *size))[:, :, 0]
        previous = logits.gather(2, best.expand(-1, -1, 1, *logits.shape[-2:]))[:, :, 0]
    return out


def next_click(answer: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Where a patient user clicks next: answer and truth bool [O,H,W] -> place [O,2] (x y, fractions) and whether it is inside [O]."""
    wrong = answer != truth
    wrong = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, truth)          # nothing wrong: another place of the object
    depth = torch.maximum(depth_in(wrong & truth), depth_in(wrong & ~truth)).flatten(1)
    at = depth.argmax(1)
    h, w = truth.shape[-2:]
    return torch.stack([at % w / w, at // w / h], 1), truth.flatten(1).gather(1, at[:, None])[:, 0].long()


def depth_in(mask: Tensor) -> Tensor:
    """How often a mask [O,H,W] can be eroded (eight neighbours, the border of the picture counts as outside) until a place is gone: [O,H,W]."""
    left, out = F.pad(mask.float(), (1, 1, 1, 1)), torch.zeros(mask.shape, device=mask.device)
    while left.any():
        out += left[:, 1:-1, 1:-1]
        left = F.pad(-F.max_pool2d(-left, 3, 1), (1, 1, 1, 1))
    return out
