"""Text-video retrieval: R@1, R@5, R@10 and median rank, both ways, with any number of captions a video.

Each caption is a query of its own; from video to text the best placed of a video's captions counts. A system with several vectors a video
(`encode_video_parts`) is asked for them, and a text is as similar to the video as to the nearest (Portillo-Quintero et al. 2021).
"""
from typing import Any

from torch import Tensor

from polysense.base.protocols import fulfils
from polysense.tasks.encode import Features, Progress, encode_each
from polysense.tasks.result import Result
from polysense.tasks.retrieval import examined


def run(subject: Any, test: Any, *, seed: int = 0, progress: Progress | None = None) -> Result:
    """The mean of the six recalls comes first. Intervals draw whole videos, with all their captions. `subject` also has `read_videos`."""
    return examined("video_retrieval", subject, encode_all_videos(subject, test, progress), seed, "video")


def encode_all_videos(subject: Any, source: Any, progress: Progress | None = None) -> Features:
    """Unit features [n,K,D] of every readable video of a source: see `encode_each`."""
    several = fulfils(subject.system, "encode_video_parts")

    def encode(video: Any) -> Tensor:
        read = subject.read_videos([video])
        return subject.system.encode_video_parts(read)[0] if several else subject.system.encode_video(read)

    return encode_each(subject, source, "video", encode, progress)
