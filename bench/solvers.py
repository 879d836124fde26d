"""Does DPM-Solver++ in 15 and 20 steps draw as well as DDIM in 100? FID and KID of a small DDPM's digits.

    python bench/solvers.py [--train 400] [--count 150] [--seeds 3] [--run FOLDER] [--json docs/proofs/bench_solvers.json]

One `ddpm` is trained as its proof trains it (real digits at 16 px), or taken from a run folder. All samplers start from the same noise; features
are those of the exam `generation` (a small classifier of real pictures), the real pictures are the test part. The score is the paired mean over
the seeds of the noise; a distance counts as reached where it is at most 1.05 times that of DDIM.
"""
import argparse
import os
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filing import PROOFS, goal, write

import polysense
from polysense.archetypes.denoiser import Sampler
from polysense.data import source
from polysense.data.loader import Loader
from polysense.proofs import ddpm as proof
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import gain
from polysense.tasks.generation import fid, kid, seen_by, teach

ARMS = {"DDIM, 100": ("ddim", 100), "DPM-Solver++, 20": ("dpm", 20), "DPM-Solver++, 15": ("dpm", 15)}
SLACK = 1.05


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("train", 400), ("count", 150), ("seeds", 3)):
        words.add_argument(f"--{name}", type=int, default=value)
    words.add_argument("--run", type=Path, help="the run folder of a trained ddpm, in place of training one")
    words.add_argument("--data", default="mnist")
    words.add_argument("--json", type=Path, default=PROOFS / "bench_solvers.json")
    o = words.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    train, test = source(o.data), source(o.data, split="test")
    subject = polysense.open(o.run) if o.run else train_arm("ddpm", proof.plan(o.train), train, needs=("image",), seed=0).subject
    system, feed = subject.system, subject.preset.feed
    assert feed.image is not None
    judge = teach(train, feed.image, steps=250)
    held = torch.cat([b["image"] for b in Loader(test, feed, None, batch_size=250, train=False, needs=("image",))])
    real = seen_by(judge, held)[0]
    scores: dict[str, dict[str, list[float]]] = {"FID": {}, "KID": {}}
    seconds: dict[str, list[float]] = {}
    for seed in range(o.seeds):
        for name, (sampler, steps) in ARMS.items():
            torch.manual_seed(seed)
            system.sampler = Sampler(name=sampler)
            begun = time.process_time()
            drawn = torch.cat([system.sample_image(50, steps=steps) for _ in range(o.count // 50)])
            seconds.setdefault(name, []).append(time.process_time() - begun)
            features = seen_by(judge, drawn)[0]
            for measure, of in (("FID", fid), ("KID", kid)):
                scores[measure].setdefault(name, []).append(of(features, real))
            print(seed, name, {m: round(v[name][-1], 4) for m, v in scores.items()}, flush=True)
    mean = {m: {name: fmean(v) for name, v in by.items()} for m, by in scores.items()}
    fast = [name for name in ARMS if name.startswith("DPM")]
    ratios = {f"{m} of {name} / of DDIM, 100": mean[m][name] / mean[m]["DDIM, 100"] for m in mean for name in ARMS if name != "DDIM, 100"}
    ratios |= {f"time of DDIM, 100 / of {name}": fmean(seconds["DDIM, 100"]) / fmean(seconds[name]) for name in fast}
    better: dict[str, Any] = {f"{m}: gain of {name} over DDIM, 100, with its 95 % interval over seeds":
                              gain(scores[m][name], scores[m]["DDIM, 100"], False) for m in scores for name in fast}
    write(o.json, what=f"Processor seconds for {o.count} pictures; a ratio of distances below 1 is in favour of the fast solver",
          settings={"data": o.data, "pictures": o.count, "seeds": o.seeds, "training steps": None if o.run else o.train},
          seconds={name: fmean(v) for name, v in seconds.items()}, ratios=ratios,
          goals={k: goal(v, most=SLACK) for k, v in ratios.items() if k.startswith(("FID of DPM", "KID of DPM"))},
          notes={"by seed": scores, **better, "FID of as many real pictures": fid(real[:o.count], real)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
