"""Histograms of oriented gradients of a batch of pictures: ours in one pass over the batch, against scikit-image picture by picture, in one run.

    python bench/hog.py [--rounds 3] [--batch 64] [--json docs/proofs/bench_hog.json]

224 px, three channels, nine bins, cells of 8 px, float32. scikit-image (`pip install scikit-image`; it is no dependency) computes one picture and one
channel at a time; its gradients are plain differences and its cells are not normalised here, which is less work than ours. Both on as many threads as
OMP_NUM_THREADS says. Arms are interleaved, the median is taken.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import torch
from filing import PROOFS, goal, medians, write

from polysense.decoders.hog import hog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, default=PROOFS / "bench_hog.json")
    args = parser.parse_args()
    try:
        from skimage.feature import hog as theirs
    except ImportError:
        sys.exit("this bench needs scikit-image: pip install scikit-image")
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, 224, 224)
    arrays = image.numpy()

    def loop() -> None:
        for picture in arrays:
            for channel in picture:
                theirs(channel, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), feature_vector=False)

    arms = {"ours": lambda: hog(image), "scikit-image": loop}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(args.rounds + 1):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            if round_:                       # the first round warms up
                times[name].append(time.perf_counter() - start)
    seconds = medians(times)
    ratio = seconds["scikit-image"] / seconds["ours"]
    write(args.json, what="Seconds for the histograms of a batch of pictures; a ratio above 1 is in our favour",
          settings={"batch": args.batch, "rounds": args.rounds, "pixels": 224, "cell": 8, "bins": 9}, seconds=seconds,
          ratios={"scikit-image / ours": ratio}, goals={"scikit-image / ours": goal(ratio, least=20.0)})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
