"""What is lost where a system draws pictures again: PSNR and SSIM of each against the picture as it was read, and of image codecs how many of their
codes are in use.

Masked models are shown what their mask leaves, which `seed` draws; what they see counts as well, so that a smaller share of hidden patches scores
better. LPIPS is measured where its network is handed in: a `decoders.perceptual.Perceptual` with published weights (`weights.lpips`).
"""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.protocols import fulfils
from polysense.data.sources import BadSample
from polysense.tasks.encode import Progress, frozen, name_of, sample_of
from polysense.tasks.likeness import psnr, ssim
from polysense.tasks.result import Result, Units, mean_of, metric


def run(subject: Any, test: Any, *, seed: int = 0, distance: Callable[[Tensor, Tensor], Tensor] | None = None, batch_size: int = 32,
        progress: Progress | None = None) -> Result:
    """Means over the pictures of a source. distance: of two pictures [1,3,H,W] in [-1,1] -> [1]: lpips. Of a system with `encode_codes` the notes say
    how many different codes occur, of how many, and their perplexity: as many codes, used equally, would be as hard to guess."""
    found: dict[str, list[float]] = {"psnr": [], "ssim": []}
    skipped, used, plan = list[list[str]](), list[Tensor](), subject.preset.feed.image
    with ThreadPoolExecutor(4) as pool, frozen(subject.system), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(test), batch_size):
            rows = range(start, min(start + batch_size, len(test)))
            got = list(pool.map(lambda i: sample_of(test, i), rows))
            skipped += [[s.id, s.reason] for s in got if isinstance(s, BadSample)]
            if fine := [s["image"] for s in got if not isinstance(s, BadSample)]:
                image = subject.read_images(fine)
                drawn = subject.system.reconstruct(image)
                if not drawn.isfinite().all():
                    raise UserError("reconstruct returned numbers that are not finite", "the weights are damaged, or its training diverged")
                for one, two in zip(shades(drawn, plan), shades(image, plan), strict=True):
                    found["psnr"].append(psnr(one, two))
                    found["ssim"].append(ssim(one, two))
                    if distance is not None:
                        found.setdefault("lpips", []).append(float(distance(*(x.permute(2, 0, 1)[None] * 2 - 1 for x in (one, two)))))
                if fulfils(subject.system, "encode_codes"):
                    used.append(subject.system.encode_codes(image).flatten().cpu())
            if progress:
                progress(rows.stop, len(test))
    if not found["psnr"]:
        raise UserError(f"no picture of {test.name!r} can be read", skipped[0][1] if skipped else "it is empty")
    n = len(found["psnr"])
    metrics = {k: metric(mean_of(np.array(v)), n, seed=seed) for k, v in found.items()}
    notes = {**({"skipped": skipped} if skipped else {}), **(codes_in_use(subject.system, torch.cat(used)) if used else {})}
    return Result("reconstruction", name_of(subject), test.name, n, metrics, {}, notes, Units(np.array(found["psnr"])[None], np.ones((1, n))))


def shades(image: Tensor, plan: Any) -> Tensor:
    """Pictures [B,3,H,W], normalised as the plan says -> [B,H,W,3] in [0,1]."""
    mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (plan.mean, plan.std))
    return (image.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu()


def codes_in_use(system: Any, ids: Tensor) -> dict[str, Any]:
    """ids [n] of codes."""
    share = torch.bincount(ids).double() / len(ids)
    share = share[share > 0]
    whole = {"codes": count} if (count := getattr(getattr(system, "codec", None), "codes", None)) else {}
    return {"codes in use": len(share), **whole, "perplexity of the codes": round(float((-(share * share.log()).sum()).exp()), 2)}
