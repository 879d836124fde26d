"""Pictures and texts judged in pairs: does this text belong to this picture, and where in it is it seen?"""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from polysense.base.errors import UserError
from polysense.data.images import decode, window
from polysense.pipeline.heat import Explanation, Heat, placed
from polysense.train.precision import autocast

THUMBNAIL = 512                                       # longest side of the picture that the heat-map is drawn on, pixels


def match(pipeline: Any, images: Sequence[Any], texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """Probability [N,M] that text m belongs to picture n: every pair is looked at on its own."""
    pipeline._need("match_text")
    if not images or not texts:
        raise UserError("there is nothing to match", "give at least one picture and one text")
    if any(not t.strip() for t in texts):
        raise UserError("a text is empty", "say what to look for")
    out, ids = [], pipeline.read_texts(texts)
    with torch.inference_mode(), autocast("auto", pipeline.device)(True):
        for image in images:
            pixels = pipeline.read_images([image])
            out.append(torch.cat([pipeline.system.match_text(pixels, ids[s:s + batch_size]).float().cpu() for s in range(0, len(ids), batch_size)]))
    chance = torch.stack(out)
    if not chance.isfinite().all():
        raise UserError("match_text returned numbers that are not finite", "the weights are damaged, or their training diverged")
    return chance.numpy()


def ground(pipeline: Any, image: Any, text: str) -> Explanation:
    """Where in a picture a text is found; the score of `whole` is the probability that it belongs there at all."""
    pipeline._need("match_text", "ground_text")
    picture = decode(image)
    chance = float(match(pipeline, [picture], [text])[0, 0])
    heat = pipeline.system.ground_text(pipeline.read_images([picture]), pipeline.read_texts([text]))[0].float().cpu().numpy()
    thumbnail = picture.copy()
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    full = placed(heat, thumbnail.size, window(picture.size, pipeline._image_plan()))
    return Explanation(text, thumbnail, Heat(text, chance, 1.0, full, heat), ())
