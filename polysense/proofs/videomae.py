"""VideoMAE draws the hidden tubes of unseen clips better than their surroundings would (the nearest
visible cube); hidden at random places they would be easier still.

The second is the paper's argument for tubes: what is hidden in one frame only can be copied from the next. Raw pixels are drawn, so that the guesses
can be compared. Sizes were chosen with other seeds on training clips; the scored clips were not looked at.

As filed: better than the nearest visible cube, which the entry names; the mean colour of the visible cubes (in the notes) is not beaten, and
fine-tuning for motion with 200 labels gains nothing at this size.
"""
from dataclasses import replace

import torch

from polysense.base.system import Preset, Spec, System
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Source
from polysense.mechanisms.mask_sampler import RandomMask, TubeMask
from polysense.nn.head import Nothing
from polysense.proofs.arms import Arm, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.hidden import cube_guesses
from polysense.systems.selfsup import videomae

METRIC, HIGHER_IS_BETTER = "mean squared error of hidden 2x8x8 cubes of unseen clips of 16x32x32 (normalised pixels), tubes of 75 %, 220 steps", False
DATA = "scenes:clips (800 clips of 16 frames, 200 unseen; motions of 200 of them as labels in the notes)"
RATIO = 0.75


def small(sampler: Spec) -> Preset:
    base = videomae.tiny()
    return base.but(config=base.config.but(sampler=sampler)).but(**{"config.target.norm": "none", "stages.0.steps": 220, "stages.0.batch_size": 24})


def errors(arm: Arm, clips: Source) -> dict[str, float]:
    system, sums, batches = arm.subject.system, dict[str, float](), 0
    torch.manual_seed(1234)
    with torch.inference_mode():
        for batch in Loader(clips, arm.subject.preset.feed, None, batch_size=50, train=False, needs=("video",)):
            masking, cubes = system.masking(batch["video"]), system.target.patches(batch["video"])
            drawn, truth = system.pairs(batch["video"], masking)
            for name, guess in {"VideoMAE": drawn, **cube_guesses(cubes, masking, system.encoder.grid)}.items():
                sums[name] = sums.get(name, 0.0) + float((guess - truth).square().mean())
            batches += 1
    return {name: value / batches for name, value in sums.items()}


def motion(encoder: System | None, few: Source, test: Source, seed: int) -> float:
    """Accuracy of the motion's name after fine-tuning on few labels."""
    config, stage = videomae.tiny().config, videomae.tiny().stages[0]
    preset = videomae.tiny().but(
        config=config.but(decoder=Nothing.Config(), head=videomae.NormHead.Config(into=96, out=len(few.classes))),
        stages=(replace(stage, objective=videomae.VideoMAE.recognise, steps=40, batch_size=32).but(**{"optim.lr": 1e-3, "optim.warmup": 5}),))

    def carry(system: System) -> None:
        if encoder is not None:
            system.encoder.load_state_dict(encoder.state_dict())  # type: ignore[operator]

    system, right, total = train_arm("videomae", preset, few, needs=("video", "label"), seed=seed, prepare=carry).subject.system, 0, 0
    with torch.inference_mode():
        for batch in Loader(test, preset.feed, None, batch_size=50, train=False, needs=("video", "label")):
            right, total = right + int((system.classify_video(batch["video"]).argmax(1) == batch["label"]).sum()), total + len(batch["label"])
    return right / total


def run(seed: int) -> Outcome:
    clips = source(f"scenes:clips?n=800&seed={seed}&size=32&frames=16")
    unseen = source("scenes:clips?n=200&seed=900&size=32&frames=16", split="test")
    tube, anywhere = (train_arm("videomae", small(s), clips, needs=("video",), seed=seed)
                      for s in (TubeMask.Config(ratio=RATIO), RandomMask.Config(ratio=RATIO)))
    found, easier, few = errors(tube, unseen), errors(anywhere, unseen)["VideoMAE"], some_of(clips, 200, seed)
    mean = found.pop("mean of the visible cubes")
    return Outcome(whole := found.pop("VideoMAE"), found, {
        "mean of the visible cubes": mean, "hidden at random places instead": easier, "random is easier": easier < whole,
        "motion, 200 labels, after VideoMAE": motion(tube.subject.system.encoder, few, unseen, seed),
        "motion, 200 labels, from scratch": motion(None, few, unseen, seed)})
