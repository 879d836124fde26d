"""Videos, sounds and maps into a pipeline: read as the preset's feed says, encoded one by one or in batches. Shapes: T frames, S samples."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan, Preset, VideoPlan
from polysense.base.protocols import fulfils
from polysense.data import clips, images
from polysense.data.clips import several
from polysense.data.planes import read_planes
from polysense.train.precision import autocast

Progress = Callable[[int, int], object]
CHUNK = 32                                              # frames of a stream that are in memory at once


def video_plan(preset: Preset) -> tuple[VideoPlan, ImagePlan]:
    """Which frames are read and how. Raises UserError for a system that reads no pictures."""
    plan = preset.feed.video or VideoPlan()
    image = plan.image or preset.feed.image
    if image is None:
        raise UserError("this system does not read videos", "its feed has neither an image nor a video plan")
    return plan, image


def stream_video(preset: Preset, item: Any, chunk: int = CHUNK) -> Iterator[Tensor]:
    """The frames of one video (path, bytes, uint8 [T,H,W,3]) that the feed asks for, in pieces [t,3,H,W]; nothing else is kept in memory."""
    plan, image = video_plan(preset)
    frames = (images.pixels(images.fit(images.decode(f), image)) for f in clips.chosen(item, plan))
    while some := list(islice(frames, chunk)):
        yield images.normalised(torch.from_numpy(np.stack(some)), image)


class Clips:
    """The part of a Pipeline that reads and encodes videos and sounds."""
    system: Any
    preset: Preset
    device: torch.device

    def read_videos(self, videos: Sequence[Any]) -> Tensor:
        """Paths, bytes or uint8 arrays [T,H,W,3] -> [B,T,3,H,W] on the device. Raises UserError for videos of which the feed reads different
        numbers of frames: read those one at a time."""
        made = [torch.cat(list(stream_video(self.preset, v))) for v in videos]
        if len({len(m) for m in made}) > 1:
            raise UserError(f"these videos have {', '.join(str(len(m)) for m in made[:6])} frames", "read them one at a time")
        return torch.stack(made).to(self.device)

    def read_video_views(self, video: Any, clips: int = 1, crops: int = 1) -> Tensor:
        """One video -> [clips * crops,T,3,H,W] on the device: `clips` times from its beginning to its end, each with `crops` squares along the longer
        side (Feichtenhofer et al. 2019, SlowFast, section 4: ten times three). Raises UserError for crops of pictures that the feed does not crop."""
        plan, image = video_plan(self.preset)
        if crops < 1 or (crops > 1 and image.fit != "crop"):
            raise UserError(f"{crops} crops of frames", f"this system reads frames whole (fit={image.fit!r}): one crop" if crops else "count from 1")
        places, views = [0.5] if crops == 1 else [i / (crops - 1) for i in range(crops)], list[np.ndarray]()
        for clip in several(video, plan, clips):
            pictures = [images.decode(f) for f in clip]
            views += [np.stack([images.pixels(images.fit(p, image, place=x)) for p in pictures]) for x in places]
        made = torch.from_numpy(np.stack(views))
        return images.normalised(made.flatten(0, 1), image).unflatten(0, made.shape[:2]).to(self.device)

    def read_audios(self, audios: Sequence[Any], rate: int | None = None) -> Tensor:
        """Paths, bytes or float arrays [S] (at `rate`, by default the feed's) -> [B,S] on the device, resampled and cut as the feed says,
        silence behind shorter ones."""
        plan = self.preset.feed.audio
        if plan is None:
            raise UserError("this system does not read sounds", "its feed has no audio plan")
        waves = [clips.resampled(w, rate, plan.rate) if rate and isinstance(a, np.ndarray) else w
                 for a in audios for w in [clips.read_sound(a, plan.rate)]]
        made = [torch.from_numpy(clips.cut(w, clips.samples_of(plan, False))) for w in waves]
        return torch.nn.utils.rnn.pad_sequence(made, batch_first=True).to(self.device)

    def encode_video_parts(self, video: Any) -> np.ndarray:
        """One video -> its vectors [K,D], unit norm: one, or several of which a text meets the nearest. Streams where the system can."""
        with torch.inference_mode(), autocast("auto", self.device)(True):
            if fulfils(self.system, "encode_stream"):
                out = self.system.encode_stream(c.to(self.device) for c in stream_video(self.preset, video))
            elif fulfils(self.system, "encode_video_parts"):
                out = self.system.encode_video_parts(self.read_videos([video]))[0]
            else:
                out = self.system.encode_video(self.read_videos([video]))
        return finite(out, "encode_video")

    def encode_videos(self, videos: Sequence[Any], progress: Progress | None = None) -> np.ndarray:
        """Videos -> unit vectors [N,D], float32."""
        rows = []
        for i, video in enumerate(videos):
            mean = self.encode_video_parts(video).mean(0)
            rows.append(mean / np.linalg.norm(mean).clip(1e-12))
            if progress:
                progress(i + 1, len(videos))
        return np.stack(rows).astype(np.float32)

    def encode_audios(self, audios: Sequence[Any], progress: Progress | None = None) -> np.ndarray:
        """Sounds -> unit vectors [N,D], float32; one at a time, so that no sound is padded for its neighbours."""
        rows = []
        for i, audio in enumerate(audios):
            wave = self.read_audios([audio])
            with torch.inference_mode(), autocast("auto", self.device)(True):
                rows.append(finite(self.system.encode_audio(wave), "encode_audio"))
            if progress:
                progress(i + 1, len(audios))
        return np.concatenate(rows)


    def encode_planes(self, planes: Sequence[Any], of: str = "depth") -> np.ndarray:
        """Maps of "depth" or "thermal" (paths, arrays [H,W]) -> unit vectors [N,D], float32. UserError for a system without a tower for them."""
        if not fulfils(self.system, f"encode_{of}"):
            raise UserError(f"{type(self.system).__name__} cannot encode_{of}", f"see `polysense list --can encode_{of}`")
        if self.preset.feed.image is None:
            raise UserError("this system does not say how maps are cut", "its feed has no image plan")
        batch = torch.from_numpy(read_planes(self.preset.feed.image, list(planes), of)).to(self.device)
        with torch.inference_mode(), autocast("auto", self.device)(True):
            return finite(getattr(self.system, f"encode_{of}")(batch), f"encode_{of}")


def finite(features: Tensor, capability: str) -> np.ndarray:
    """float32 on the CPU; UserError where it holds a NaN."""
    features = features.float().cpu()
    if not features.isfinite().all():
        raise UserError(f"{capability} returned numbers that are not finite", "the weights are damaged, or their training diverged")
    return features.numpy()


def similarities(parts: Iterable[np.ndarray], texts: np.ndarray) -> np.ndarray:
    """Vectors [K,D] of each of N videos (K may differ), texts [M,D] -> [M,N], the largest cosine of each."""
    return np.stack([(texts @ p.T).max(1) for p in parts], 1)
