"""Views of a traced scene that were not trained on: waves and late directions earn their place, and memory alone does not do.

Sizes were set by time, after a look at the val views of another seed; the test views were not looked at. 600 steps of 256 rays and networks
4 x 64 stand in for the 2,500 steps of 512 rays and the 4 x 96 of `tiny`.
"""
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from polysense.base.batch import Batch
from polysense.base.system import Preset
from polysense.data import source
from polysense.decoders.radiance import Waves
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.scene import nerf
from polysense.tasks import take
from polysense.tasks.likeness import psnr, ssim

METRIC, HIGHER_IS_BETTER = "PSNR of 6 test views at 40x40, 12 training views", True
DATA = "solids (12 train, 6 test views at 40x40)"
STEPS, RAYS = 600, 256


def rays(cameras: Any, seed: int) -> Iterator[Batch]:
    """Endless batches of random rays over all views."""
    made = [cameras.rays(v) for v in range(len(cameras.image))]
    origin, direction = (torch.from_numpy(np.concatenate([m[i] for m in made])) for i in (0, 1))
    rgb, lot = torch.from_numpy(cameras.image.reshape(-1, 3)), torch.Generator().manual_seed(seed)
    while True:
        pick = torch.randint(len(rgb), (RAYS,), generator=lot)
        yield {"origin": origin[pick], "direction": direction[pick], "rgb": rgb[pick]}


def preset(**net: Any) -> Preset:
    base = nerf.tiny()
    fields = {f"config.{side}.{k}": v for k, v in net.items() for side in ("coarse", "fine")}
    small = {f"config.{side}.width": 64 for side in ("coarse", "fine")} | {"config.samples": 20, "config.more": 20}
    return base.but(**small, **fields, **{"stages.0.steps": STEPS, "stages.0.batch_size": RAYS, "stages.0.optim.lr": 3e-3})


def nearest(train: Any, test: Any) -> dict[str, float]:
    """What the training view from the nearest place scores."""
    away = ((test.pose[:, None, :3, 3] - train.pose[None, :, :3, 3]) ** 2).sum(-1).argmin(1)
    pairs = [(torch.from_numpy(train.image[j]), torch.from_numpy(test.image[i])) for i, j in enumerate(away)]
    return {"psnr": float(np.mean([psnr(*p) for p in pairs])), "ssim": float(np.mean([ssim(*p) for p in pairs]))}


def compare(seed: int, split: str) -> dict[str, dict[str, float]]:
    learn, asked = source(f"solids?views=12&seed={seed}"), source(f"solids?views=12&seed={seed}", split)
    arms = {"nerf": preset(), "no waves": preset(place=Waves.Config(levels=0), direction=Waves.Config(levels=0)),
            "early direction": preset(view="early")}
    table = {"nearest training view": nearest(learn.cameras, asked.cameras)}  # type: ignore[attr-defined]
    for name, of in arms.items():
        subject = train_arm("nerf", of, learn, needs=("origin", "direction", "rgb"), seed=seed,
                            batches=rays(learn.cameras, seed)).subject  # type: ignore[attr-defined]
        table[name] = {k: m.value for k, m in take("views", subject, asked).metrics.items()}
    return table


def run(seed: int) -> Outcome:
    table = compare(seed, "test")
    baselines = {k: v["psnr"] for k, v in table.items() if k != "nerf"}
    return Outcome(table["nerf"]["psnr"], baselines, {
        "all": table, "early direction has the worse depth": table["early direction"]["depth_error"] > table["nerf"]["depth_error"]})
