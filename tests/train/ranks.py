"""What one rank of a torchrun does for test_parallel.py: every way to train the toy over all ranks, the loss curves into OUT/curves.json."""
import json
import os
import sys
from pathlib import Path

import torch
from train.toys import TRAINABLE, Toy, ToyFeeding, preset_of, stage_of

from polysense.base.errors import UserError
from polysense.train.parallel import world
from polysense.train.run import Saved, Stepped, train_preset

NORMED = (*TRAINABLE, "frozen.0.weight", "frozen.1.*")        # not frozen.0.bias: batch norm takes its gradient away but for noise
WAYS = {
    "plain": ("ddp", stage_of(objective=Toy.compare_all, clip=0.5, ema=0.9)),
    "cached": ("ddp", stage_of(objective=Toy.compare_all, chunk=2, clip=0.5, ema=0.9)),
    "pointwise": ("ddp", stage_of(objective=Toy.pointwise, embed=None, accumulate=2, lr=1e-3)),
    "normed": ("ddp", stage_of(objective=Toy.compare_all, trainable=NORMED)),
    "sharded": ("fsdp", stage_of(objective=Toy.compare_all, clip=0.5, ema=0.9)),
    "sharded_cached": ("fsdp", stage_of(objective=Toy.compare_all, chunk=2, checkpoint_activations=True)),
    "sharded_lamb": ("fsdp", stage_of(objective=Toy.compare_all).but(**{"optim.name": "lamb"})),
    "sharded_adafactor": ("fsdp", stage_of(objective=Toy.compare_all).but(**{"optim.name": "adafactor"})),
    "sharded_lars": ("fsdp", stage_of(objective=Toy.compare_all).but(**{"optim.name": "lars"})),
}


def curve(way: str, out: Path, kind: str, until: int | None = None, **options) -> list[float]:
    seen = []
    stage = WAYS[way][1]
    preset = preset_of(stage, noise=0.0)
    for event in train_preset("toy", preset, ("image", "text"), out=out / way, feeding=ToyFeeding(), parallel=kind, device="cpu", **options):
        if isinstance(event, Stepped):
            seen.append((event.total, event.grad_norm))
        if isinstance(event, Saved) and event.step == until:
            break
    return seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with world("cpu") as here:
        curves = {way: curve(way, out, kind) for way, (kind, _) in WAYS.items()}
        half = curve("sharded", out / "stopped", "fsdp", until=4, checkpoint_every=2)
        curves["resumed"] = half[:4] + curve("sharded", out / "stopped", "fsdp", resume=True)
        try:
            curve("plain", out, "ddp")
        except UserError as error:
            curves["refused"] = here.gathered(str(error))
        if here.first:
            (out / "curves.json").write_text(json.dumps(curves))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)                                                # as in test_spread: torch's threads sometimes abort an unwinding interpreter
