"""BEVT names hidden codes of real clips better where photographs are learned beside the clips than where clips alone have as much time, and better
than the nearest frame in which a place can be seen would: scored at places that move.

Both arms share tokenizer and trunk. The joint one spends a part of its time on photographs alone (stage 1) and a part of every later step; the other
makes as many more steps on clips (`ALONE`), their seconds are in the notes. Windows of 8 frames are cut from clips in memory, at random. A place
moves where its 4x4 pixels differ from those of the frame before by more than `MOVES`. Sized on training clips that training leaves out. As filed it
is a miss: after so few steps neither arm comes near to what copying gives, and the two differ by less than their seeds do.
"""
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from polysense.base.batch import Batch
from polysense.base.system import Preset, Stage, System
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Source, Subset
from polysense.proofs.arms import Arm, read_all, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.generate import vq_vae
from polysense.systems.selfsup import bevt

METRIC, HIGHER_IS_BETTER = "share of the hidden codes named right, at places that move, in unseen clips", True
DATA = "surveillance_action (200 clips, 40 unseen) and 3,000 photographs of tiny_imagenet40, 32 px; 64 codes, 8x8 a frame"
PICTURES, JOINT, ALONE, BATCH, CODEC = 300, 500, 820, 8, 250
LONG, FRAMES, UNSEEN, MOVES = 32, 8, 30, 0.15


def plan() -> Preset:
    return bevt.tiny().but(starts=(), **{"config.encoder.base": 32, "stages.0.batch_size": BATCH, "stages.0.steps": JOINT})


def clips_of(base: Source, preset: Preset) -> Tensor:
    """Every clip as LONG frames, [N,LONG,3,32,32]."""
    feed = preset.feed.but(**{"video.frames": LONG})
    return torch.cat([b["video"] for b in Loader(base, feed, None, batch_size=20, train=False, needs=("video",))])


def windows(clips: Tensor, photos: Tensor, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows, at = torch.randint(len(clips), (BATCH,), generator=generator), torch.randint(LONG - FRAMES + 1, (BATCH,), generator=generator)
        others = torch.randint(len(photos), (BATCH,), generator=generator)
        yield {"video": torch.stack([clips[r, a:a + FRAMES] for r, a in zip(rows, at, strict=True)]), "image": photos[others]}


def told(system: Any, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(named right, copied right, where to score), each [B,F,h,w], of windows under masks that the global seed draws."""
    ids = system.codes(video)
    b, f, h, w = ids.shape
    mask = system.video_mask(b, (f // 2, h, w)).mask.view(b, f // 2, h, w)
    every = mask.repeat_interleave(2, 1)
    change = (video[:, 1:] - video[:, :-1]).abs().mean(2)
    change = torch.nn.functional.avg_pool2d(torch.cat([change[:, :1], change], 1), 4)
    scored = every & (change > MOVES)
    near = torch.full_like(ids, -1)
    for i in range(f):                       # from the farthest frame to the nearest, of two the earlier one last
        for j in sorted(range(f), key=lambda j: (-abs(i - j), -j)):
            near[:, i] = torch.where(every[:, j], near[:, i], ids[:, j])
    return system.name_clip(video, mask).argmax(-1) == ids, near == ids, scored


def share(system: System, clips: Tensor) -> tuple[float, float, int]:
    """(named right, copied right, how many) over three windows of each unseen clip."""
    torch.manual_seed(1234)
    with torch.inference_mode():
        parts = [told(system, clips[:, a:a + FRAMES]) for a in (0, (LONG - FRAMES) // 2, LONG - FRAMES)]
    right, copied, scored = (torch.cat(v) for v in zip(*parts, strict=True))
    return float(right[scored].float().mean()), float(copied[scored].float().mean()), int(scored.sum())


def compare(seed: int, train: Source, test: Source, photos: Source) -> Outcome:
    preset = plan()
    clips, unseen, (pictures, _) = clips_of(train, preset), clips_of(test, preset), read_all(preset.feed, photos)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (bevt.MEAN, bevt.STD))
    seen = torch.cat([pictures, clips[:, ::8].flatten(0, 1)]) * std * 2 + mean * 2 - 1                # as the tokenizer reads them

    def any_of() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield {"image": seen[torch.randint(len(seen), (16,), generator=generator)]}

    tokenizer = vq_vae.small().but(**{"stages.0.steps": CODEC})
    codec = train_arm("vq_vae", tokenizer, photos, needs=("image",), seed=seed, batches=any_of()).subject.system.codec

    def arm(stage: Stage, before: Arm | None = None) -> tuple[Arm, float]:
        """Trained from what an earlier arm learned, inflated, or from nothing; and its seconds."""
        def carry(system: Any) -> None:
            system.target.codec.load_state_dict(codec.state_dict())
            if before is not None:
                system.load_state_dict(before.subject.system.state_dict())

        start = perf_counter()
        made = train_arm("bevt", preset.but(stages=(stage,)), train, needs=("image", "video"), seed=seed,
                         batches=windows(clips, pictures, seed), prepare=carry)
        return made, perf_counter() - start

    joint = preset.stages[0]
    first, early = arm(joint.but(name="pictures", objective=bevt.BEVT.look, trainable=bevt.OF_PICTURES, steps=PICTURES))
    (both, took), (alone, other) = arm(joint, first), arm(joint.but(objective=bevt.BEVT.watch, steps=ALONE))
    mine, copied, n = share(both.subject.system, unseen)
    less = share(alone.subject.system, unseen)[0]
    return Outcome(mine, {"clips alone, for as long": less, "the nearest frame that shows the place": copied}, {
        "clips alone beat copying": less > copied, "scored places": n, "seconds of both streams": early + took, "seconds of clips alone": other})


def run(seed: int, chosen: bool = False) -> Outcome:
    """chosen: as its sizes were, on training clips alone."""
    base, photos = source("surveillance_action"), some_of(source("tiny_imagenet40"), 3000, seed)
    if chosen:
        order = torch.randperm(len(base), generator=torch.Generator().manual_seed(seed)).tolist()
        return compare(seed, Subset(base, order[:-UNSEEN]), Subset(base, order[-UNSEEN:]), photos)
    return compare(seed, base, source("surveillance_action", split="test"), photos)
