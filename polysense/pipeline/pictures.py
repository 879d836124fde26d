"""From what systems draw to pictures: the inverse of how the feed normalises them."""
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan


def to_pictures(image: Tensor, plan: ImagePlan) -> list[Image.Image]:
    """image [B,3,H,W], normalised as the plan says -> RGB pictures, values outside the range cut. UserError where a number is not finite."""
    if not image.isfinite().all():
        raise UserError("the system drew numbers that are not finite", "the weights are damaged, or their training diverged")
    mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (plan.mean, plan.std))
    levels = ((image.float() * std + mean).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(x) for x in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def covered(pipeline: Any, images: Sequence[Any]) -> list[Image.Image]:
    """What a masked model is shown of each picture before it draws the rest. With the seed of torch's generator that `Pipeline.reconstruct` had,
    the same patches are hidden. UserError for a system that hides nothing."""
    if not hasattr(pipeline.system, "cover"):
        raise UserError(f"{pipeline.id or 'this system'} hides nothing of a picture", "masked models do, such as mae")
    with torch.inference_mode():
        shown = [pipeline.system.cover(pipeline.read_images(images[i:i + 32])) for i in range(0, len(images), 32)]
    return [picture for batch in shown for picture in to_pictures(batch, pipeline.preset.feed.image)]
