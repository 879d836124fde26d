"""Probes of frozen video features: those of pictures (`linear_probe`, `knn_probe`), on what `encode_video` says of one view of each video, or on the
mean of several."""
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from polysense.tasks import knn_probe, linear_probe
from polysense.tasks.encode import Features, Progress, encode_each
from polysense.tasks.result import Result


def linear(subject: Any, test: Any, train: Any, *, clips: int = 1, crops: int = 1, seed: int = 0, progress: Progress | None = None) -> Result:
    """`clips` of each video, from its beginning to its end, and `crops` of each clip. `subject` also has `read_video_views`."""
    learn, asked = (means(subject, s, clips, crops, progress) for s in (train, test))
    found = linear_probe.run(subject, asked, learn, seed=seed)
    return replace(found, exam="video_linear_probe", notes={**found.notes, "clips": clips, "crops": crops})


def neighbours(subject: Any, test: Any, train: Any, *, k: int = 20, clips: int = 1, crops: int = 1, seed: int = 0,
               progress: Progress | None = None) -> Result:
    """`k` neighbours; `clips` and `crops` as in `linear`."""
    learn, asked = (means(subject, s, clips, crops, progress) for s in (train, test))
    found = knn_probe.run(subject, asked, learn, k=k, seed=seed)
    return replace(found, exam="video_knn_probe", notes={**found.notes, "clips": clips, "crops": crops})


def means(subject: Any, source: Any, clips: int, crops: int, progress: Progress | None = None) -> Features:
    """Unit features [n,D] of the videos of a source: the direction of the mean over the views of each."""
    def encode(video: Any) -> Tensor:
        return F.normalize(subject.system.encode_video(subject.read_video_views(video, clips, crops)).float(), dim=-1).mean(0, keepdim=True)

    found = encode_each(subject, source, "video", encode, progress)
    return replace(found, features=found.features[:, 0])
