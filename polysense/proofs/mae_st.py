"""MAE-ST draws what is hidden of unseen real clips better than what the same place showed at another time, and than the mean colour of what is seen.

Clips of fixed cameras, four of every video that is read, nine tenths of the cubes hidden. Raw pixels are drawn, so that guesses can be compared. Of
the visible cubes the guess takes the one at the same place that is nearest in time, and where there is none, the nearest place. Noted beside
it: the nearest visible cube where space and time count alike, and the time of a training step at 90 and at 50 percent hidden, which is the paper's
argument for hiding so much. Sizes are a first guess.
"""
import time
from statistics import median

import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Source
from polysense.mechanisms.mask_sampler import RandomMask
from polysense.proofs.arms import Arm, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import cube_guesses
from polysense.systems.selfsup import mae_st

STEPS, LR, CLIPS = 900, 3e-3, "surveillance_action"
METRIC = f"mean squared error of hidden patches (normalised pixels) of unseen clips of 16x32x32 in cubes of 2x8x8, 90 % hidden, {STEPS} steps of 48"
HIGHER_IS_BETTER = False
DATA = "surveillance_action (200 real clips of two seconds, 40 unseen)"


def small(ratio: float = 0.9) -> Preset:
    return mae_st.tiny().but(**{
        "config.sampler": RandomMask.Config(ratio=ratio), "config.encoder.body.width": 64, "config.encoder.body.depth": 3,
        "config.encoder.body.heads": 2, "stages.0.steps": STEPS, "stages.0.batch_size": 48, "stages.0.optim.lr": LR,
        "stages.0.optim.warmup": STEPS // 10})


@torch.inference_mode()
def errors(arm: Arm, clips: Source) -> dict[str, float]:
    system, sums = arm.subject.system, dict[str, float]()
    torch.manual_seed(1234)
    for video in [b["video"] for b in Loader(clips, arm.subject.preset.feed, None, batch_size=40, train=False, needs=("video",))] * 4:
        masking, cubes = system.masking(video), system.target.patches(video)  # type: ignore[operator, union-attr]
        drawn, truth = system.pairs(video, masking)  # type: ignore[operator]
        plain = cube_guesses(cubes, masking, system.encoder.grid)
        still = cube_guesses(cubes, masking, system.encoder.grid, haste=0.01)["nearest visible cube"]
        for name, guess in {"MAE-ST": drawn, "the same place at another time": still, **plain}.items():
            sums[name] = sums.get(name, 0.0) + float((guess - truth).square().mean()) / 4
    return sums


def seconds(ratio: float) -> float:
    """Of a training step of 24 clips, the median of five."""
    system, video, found = small(ratio).config.build(), torch.randn(24, 16, 3, 32, 32), []
    for _ in range(6):
        start = time.perf_counter()
        system.losses({"video": video}).total().backward()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def run(seed: int) -> Outcome:
    arm = train_arm("mae_st", small(), source(CLIPS), needs=("video",), seed=seed)
    found = errors(arm, source(CLIPS, split="val"))
    alike = found.pop("nearest visible cube")
    quick, slow = seconds(0.9), seconds(0.5)
    return Outcome(found.pop("MAE-ST"), found, {"nearest visible cube": alike, "a step at 50 % takes so many times that at 90 %": slow / quick})
