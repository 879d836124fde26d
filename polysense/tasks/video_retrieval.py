"""Text-video retrieval: R@1, R@5, R@10 and median rank, both ways, with any number of captions a video.

Each caption is a query of its own; from video to text the best placed of a video's captions counts. A system with several vectors a video
(`encode_video_parts`) is asked for them, and a text is as similar to the video as to the nearest (Portillo-Quintero et al. 2021).
"""
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.protocols import fulfils
from polysense.data.sources import BadSample
from polysense.tasks.encode import Features, Progress, finite, frozen
from polysense.tasks.result import Result
from polysense.tasks.retrieval import examined


def run(subject: Any, test: Any, *, seed: int = 0, progress: Progress | None = None) -> Result:
    """The mean of the six recalls comes first. Intervals draw whole videos, with all their captions. `subject` also has `read_videos`."""
    return examined("video_retrieval", subject, encode_all_videos(subject, test, progress), seed, "video")


def encode_all_videos(subject: Any, source: Any, progress: Progress | None = None) -> Features:
    """Unit features [n,K,D] of every readable video of a source, one video at a time, and its captions; unreadable ones are in `skipped`.

    Raises UserError where no video can be read or the system returns numbers that are not finite.
    """
    if isinstance(source, Features):
        return source
    rows: list[Tensor] = []
    captions: list[list[str]] = []
    skipped: list[tuple[str, str]] = []
    several = fulfils(subject.system, "encode_video_parts")
    with frozen(subject.system):
        for i in range(len(source)):
            try:
                sample = source[i]
            except BadSample as bad:
                skipped.append((bad.id, bad.reason))
                continue
            video = subject.read_videos([sample["video"]])
            rows.append(finite(subject.system.encode_video_parts(video)[0] if several else subject.system.encode_video(video), "encode_video"))
            captions.append([c for c in sample.get("captions", ()) if c.strip()])
            if progress:
                progress(i + 1, len(source))
    if not rows:
        raise UserError(f"no video of {source.name!r} can be read", skipped[0][1] if skipped else "it is empty")
    most = max(len(r) for r in rows)                     # a vector more of the same changes no maximum
    padded = torch.stack([F.pad(r.T[None], (0, most - len(r)), mode="replicate")[0].T for r in rows])
    return Features(source.name, tuple(source.offers), tuple(source.classes), padded, np.full(len(rows), -1, np.int64), captions, skipped)
