"""How much of a training step is spent on waiting for its augmented views: SimCLR, DINO, iBOT and DINOv2 at their small size, read by two workers.

    python bench/views.py [--steps 40] [--workers 2] [--data tiny_imagenet40] [--json docs/proofs/bench_views.json]

The presets `tiny` as they are: two views of every photograph, for DINO, iBOT and DINOv2 three small crops besides, all drawn anew every time.
The first five steps, in which the workers start, are left out. The share is the sum of the waiting by the sum of the steps, as the loop itself counts
them; beside it stand the seconds that a batch takes to make when nothing else runs.
"""
import argparse
import os
import time
from pathlib import Path

import torch
from filing import PROOFS, goal, write

from polysense.base.catalogue import card_of, preset_of
from polysense.data import source
from polysense.data.loader import Loader
from polysense.train.fit import fit

ROWS, WARM = ("simclr", "dino", "ibot", "dinov2"), 5


def step_of(id: str, data: str, steps: int, workers: int) -> tuple[float, float, float]:
    """(seconds of a step, seconds of it spent on waiting, seconds of a batch made alone)."""
    preset, needs = preset_of(id).but(**{"stages.0.steps": steps + WARM}), card_of(id).needs
    stage, photos = preset.stages[0], source(data)
    torch.manual_seed(0)
    fed = Loader(photos, preset.feed, None, batch_size=stage.batch_size, seed=0, needs=needs, workers=workers)
    done = [s for s in fit(preset.config.build(), stage, fed) if s.index > WARM]
    alone = iter(Loader(photos, preset.feed, None, batch_size=stage.batch_size, seed=0, needs=needs, workers=0, prefetch=0))
    next(alone)
    start = time.perf_counter()
    for _ in range(WARM):
        next(alone)
    made = (time.perf_counter() - start) / WARM
    return sum(s.seconds for s in done) / len(done), sum(s.waited for s in done) / len(done), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", default="tiny_imagenet40")
    parser.add_argument("--json", type=Path, default=PROOFS / "bench_views.json")
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    shares: dict[str, float] = {}
    for id in ROWS:
        step, waited, made = step_of(id, args.data, args.steps, args.workers)
        seconds |= {f"{id}, a step": step, f"{id}, waiting in it": waited, f"{id}, a batch made alone": made}
        shares[f"{id}, waiting / step"] = waited / step
    write(args.json, what="Seconds; the share of a step that waits for its batch, lower is better", seconds=seconds, ratios=shares,
          settings={"steps": args.steps, "workers": args.workers, "data": args.data, "threads": torch.get_num_threads()},
          goals={k: goal(v, most=0.1) for k, v in shares.items()})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
