"""Where a system looks: the attention of its class token, drawn over the picture."""
from typing import Any

import numpy as np
import torch
from PIL import Image

from polysense.base.errors import UserError
from polysense.data.images import decode, window
from polysense.pipeline.heat import overlay


def attention_of(pipeline: Any, image: Any) -> np.ndarray:
    """A picture (path, PIL, array, address) -> float32 [heads,h,w], what each head of the last block gives to every patch."""
    if not pipeline.can("attend"):
        raise UserError(f"{pipeline.id or 'this system'} cannot attend", "self-supervised ViTs can, such as dino")
    with torch.inference_mode():
        maps = pipeline.system.attend(pipeline.read_images([image]))[0].float().cpu().numpy()
    if not np.isfinite(maps).all():
        raise UserError("attend returned numbers that are not finite", "the weights are damaged, or their training diverged")
    return maps


def attention_sheet(pipeline: Any, image: Any, side: int = 256) -> Image.Image:
    """The part of the picture that was read, under the mean over heads, then under each head: a row of squares of `side` pixels."""
    picture, maps = decode(image), attention_of(pipeline, image)
    x0, y0, x1, y1 = window(picture.size, pipeline.preset.feed.image)
    (w, h), squares = picture.size, [maps.mean(0), *maps]
    seen = picture.crop((round(x0 * w), round(y0 * h), round(x1 * w), round(y1 * h))).resize((side, side))
    sheet = Image.new("RGB", (side * (1 + len(squares)), side))
    sheet.paste(seen, (0, 0))
    for i, heat in enumerate(squares):
        sheet.paste(overlay(seen, (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)), ((1 + i) * side, 0))
    return sheet
