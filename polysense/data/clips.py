"""Frames of videos and samples of sounds: which ones a plan asks for, and how files are decoded. Shapes: T frames, H W pixels, S samples."""
from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from math import ceil, gcd
from pathlib import Path
from typing import Any

import numpy as np

from polysense.base.errors import UserError, need_extra
from polysense.base.plan import AudioPlan, VideoPlan
from polysense.data.sources import BadPicture

MOVIE_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg")
SOUND_ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus")
SAMPLES = ("uniform", "all", "stride")
ZEROS = 16                                              # of the resampling kernel on each side
ROLLOFF = 0.94                                          # of the lower Nyquist frequency that passes


class BadClip(BadPicture):
    """Bytes or a file that does not hold a video or a sound; loaders leave it out like a picture that cannot be read."""


def picked(total: int, plan: VideoPlan, at: float = 0.5) -> np.ndarray:
    """Positions of the frames that a plan asks of a clip of `total` frames; `at` in [0, 1) places the window of "stride".

    A clip shorter than the window repeats its last frame. Raises UserError for a plan that cannot be met.
    """
    if plan.sample not in SAMPLES or plan.frames < (plan.sample != "all") or plan.stride < 1:
        raise UserError(f"frames={plan.frames}, sample={plan.sample!r}, stride={plan.stride} is no plan for a video",
                        f"sample is one of {', '.join(SAMPLES)}; frames and stride count from 1 (frames=0 with 'all' reads every frame)")
    if plan.sample == "all":
        return np.arange(min(total, plan.frames or total))
    if plan.sample == "uniform":
        return np.linspace(0, total - 1, plan.frames).round().astype(int)
    span = (plan.frames - 1) * plan.stride + 1
    start = int(at * (max(0, total - span) + 1))
    return (start + np.arange(plan.frames) * plan.stride).clip(max=total - 1)


def spread(total: int, plan: VideoPlan, clips: int) -> np.ndarray:
    """Positions [clips,frames] of several clips of a video of `total` frames: windows of "stride" from its beginning to its end, of "uniform" each a
    frame later than the one before. One clip is what `picked` says."""
    if clips == 1:
        return picked(total, plan)[None]
    if clips < 1 or plan.sample == "all":
        raise UserError(f"{clips} clips of a video of which every frame is read" if clips > 0 else f"{clips} clips of a video",
                        "count from 1; several need a plan that takes some of the frames")
    frames = picked(total, plan)                         # refuses a plan that cannot be met
    if plan.sample == "uniform":
        return np.linspace(0, total - 1, clips * len(frames)).round().astype(int).reshape(-1, clips).T
    room = max(0, total - (plan.frames - 1) * plan.stride - 1)
    starts = (np.arange(clips) * room / (clips - 1)).astype(int)
    return (starts[:, None] + np.arange(plan.frames) * plan.stride).clip(max=total - 1)


def several(item: Any, plan: VideoPlan, clips: int) -> list[list[np.ndarray]]:
    """The frames uint8 [H,W,3] of several clips of one video, as `spread` places them; it is decoded twice, whatever `clips` is."""
    wanted = spread(sum(1 for _ in decoded(item)), plan, clips)
    needed = set(wanted.ravel().tolist())
    held = {i: frame for i, frame in enumerate(decoded(item)) if i in needed}
    return [[held[i] for i in clip] for clip in wanted.tolist()]


def decoded(item: Any) -> Iterator[np.ndarray]:
    """A path, encoded bytes, or an array [T,H,W,3] -> its frames one by one, uint8 [H,W,3]. Needs the extra `video` but for arrays.

    Raises BadClip (a UserError) for anything that is not a whole video; frames before the damage have been given out by then.
    """
    if isinstance(item, np.ndarray):
        if item.ndim != 4 or item.shape[-1] != 3 or not len(item) or item.dtype != np.uint8:
            raise BadClip(f"an array of {item.dtype} {item.shape} is no video", "it should be uint8 [T, H, W, 3]")
        yield from item
        return
    name, thing = _opened(item)
    av = need_extra("av", "video")
    found = 0
    try:
        with av.open(thing) as movie:
            if not movie.streams.video:
                raise BadClip(f"{name!r} has no pictures in it", "it may be a sound")
            for frame in movie.decode(video=0):
                found += 1
                yield frame.to_ndarray(format="rgb24")
    except (BadClip, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # FFmpeg raises anything on damaged bytes
        raise BadClip(f"cannot read the video {name!r}", f"{type(error).__name__}: {error}") from error
    if not found:
        raise BadClip(f"the video {name!r} has no frames", "the file is damaged or cut off")


def chosen(item: Any, plan: VideoPlan, at: float = 0.5) -> Iterator[np.ndarray]:
    """The frames of one video that a plan asks for, in order, uint8 [H,W,3].

    Decodes twice where the number of frames must be known first, so that memory never holds more than what is asked for.
    """
    if plan.sample == "all":
        picked(1, plan)
        for i, frame in enumerate(decoded(item)):
            if plan.frames and i == plan.frames:
                return
            yield frame
        return
    wanted = picked(sum(1 for _ in decoded(item)), plan, at).tolist()
    place = 0
    for i, frame in enumerate(decoded(item)):
        while place < len(wanted) and wanted[place] == i:
            place += 1
            yield frame
        if place == len(wanted):
            return


def frame_rate(item: Any) -> float:
    """Frames a second of a video (path or bytes); 0 where the file does not say. Needs the extra `video`."""
    name, thing = _opened(item)
    av = need_extra("av", "video")
    try:
        with av.open(thing) as movie:
            return float(movie.streams.video[0].average_rate or 0)
    except Exception as error:  # FFmpeg raises anything on damaged bytes
        raise BadClip(f"cannot read the video {name!r}", f"{type(error).__name__}: {error}") from error


def read_sound(item: Any, rate: int | None = None) -> np.ndarray:
    """A path, encoded bytes, or samples [S] -> mono float32 [S] in [-1, 1], resampled to `rate`. Needs the extra `audio` but for arrays
    (which are taken to be at `rate` already).

    Raises BadClip (a UserError) for anything that is not a whole sound.
    """
    if isinstance(item, np.ndarray):
        if item.ndim != 1 or not len(item) or not np.issubdtype(item.dtype, np.floating) or not np.isfinite(item).all():
            raise BadClip(f"an array of {item.dtype} {item.shape} is no sound", "it should be finite floats in [-1, 1] of shape [S]")
        return item.astype(np.float32)
    name, thing = _opened(item)
    soundfile = need_extra("soundfile", "audio")
    try:
        wave, found = soundfile.read(thing, dtype="float32", always_2d=True)
    except MemoryError:
        raise
    except Exception as error:  # libsndfile raises its own and others
        raise BadClip(f"cannot read the sound {name!r}", f"{type(error).__name__}: {error}") from error
    if not len(wave) or not np.isfinite(wave).all():
        raise BadClip(f"the sound {name!r} has no samples" if not len(wave) else f"the sound {name!r} holds numbers that are not finite",
                      "the file is damaged or cut off")
    mono = wave.mean(1).clip(-1, 1)                     # lossy codecs overshoot
    return resampled(mono, found, rate or found)


def resampled(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """wave [S] at `rate` -> float32 [ceil(S * to / rate)] at `to` samples a second, by a windowed sinc (Smith, Digital Audio Resampling)."""
    if rate == to:
        return np.asarray(wave, np.float32)
    import torch
    import torch.nn.functional as F

    if rate < 1 or to < 1:
        raise UserError(f"cannot resample from {rate} to {to} samples a second", "rates are positive whole numbers")
    by = gcd(rate, to)
    up, down = to // by, rate // by                     # output k stands at input position k * down / up
    cut = ROLLOFF * min(up, down) / down                # of the input's Nyquist frequency
    width = ceil(ZEROS / cut)
    phase = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    t = (torch.arange(-width, width + down, dtype=torch.float64)[None] - phase) * cut
    window = torch.where(t.abs() < ZEROS, torch.cos(t * np.pi / ZEROS / 2) ** 2, 0.0)
    kernel = (torch.sinc(t) * window * cut).float()[:, None]                                    # [up,1,2 width + down]
    padded = F.pad(torch.from_numpy(np.ascontiguousarray(wave, np.float32))[None, None], (width, width + down))
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        out = F.conv1d(padded, kernel, stride=down)[0].T.reshape(-1)
    return out[:ceil(len(wave) * Fraction(up, down))].clamp(-1, 1).numpy()


def samples_of(plan: AudioPlan | None, train: bool) -> int | None:
    """How many samples of a sound a plan keeps; None: all."""
    if plan is None:
        return None
    seconds = plan.train_seconds if train and plan.train_seconds is not None else plan.seconds
    if plan.rate < 1 or (seconds is not None and seconds <= 0):
        raise UserError(f"rate={plan.rate}, seconds={seconds} is no plan for a sound", "both are positive")
    return None if seconds is None else max(1, round(seconds * plan.rate))


def cut(wave: np.ndarray, samples: int | None, at: float = 0.5) -> np.ndarray:
    """wave [S] -> [samples]: a window placed by `at` in [0, 1) of a longer sound, silence behind a shorter one. None: as it is."""
    if samples is None:
        return wave
    start = int(at * (max(0, len(wave) - samples) + 1))
    held = wave[start:start + samples]
    return np.pad(held, (0, samples - len(held)))


def _opened(item: Any) -> tuple[str, Any]:
    """(a name for messages, what decoders open) of a path or bytes."""
    if isinstance(item, (bytes, bytearray, memoryview)):
        if not len(item):
            raise BadClip("the clip has no bytes", "the file is empty")
        return "bytes", BytesIO(item)
    if not isinstance(item, (str, Path)):
        raise BadClip(f"cannot read a clip from {type(item).__name__}", "give a path, bytes or an array")
    path = Path(item).expanduser()
    if not path.is_file():
        raise BadClip(f"no file {str(item)!r}", "check the path")
    if not path.stat().st_size:
        raise BadClip(f"{str(item)!r} has no bytes", "the file is empty")
    return str(item), str(path)
