"""One training step of the picture tower with half and with three quarters of the patches hidden, against whole pictures, in one run.

    python bench/flip_step.py [--rounds 5] [--batch 16] [--json docs/proofs/bench_flip_step.json]

ViT-B/16 at 224 pixels (196 patches), forward and backward through FLIP's own path. Steps are interleaved, the median is taken, only ratios count.
"""
import argparse
import os
import time
from pathlib import Path

import torch
from filing import PROOFS, goal, medians, write

from polysense.nn.masking import masking_by
from polysense.systems.align import flip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, default=PROOFS / "bench_flip_step.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    system = flip.config(224, 16, (768, 12, 12), (64, 1, 1), 512, 100, 12, 0.5).build().train()
    image = torch.randn(args.batch, 3, 224, 224)
    seconds: dict[str, list[float]] = {"whole": [], "half": [], "quarter": []}
    for round_ in range(args.rounds + 1):
        for name, kept in (("whole", 196), ("half", 98), ("quarter", 49)):
            masking = masking_by(torch.rand(args.batch, 196), kept)
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
                out = system.encode_image(image) if name == "whole" else system.encode_part(image, masking)
            out.sum().backward()
            if round_:                       # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            system.zero_grad(set_to_none=True)
    median = medians(seconds)
    ratios = {f"whole / {name}": median["whole"] / median[name] for name in ("half", "quarter")}
    write(args.json, what="FLIP: seconds of the picture tower, forward and backward; how many times as fast as on whole pictures",
          settings={"batch": args.batch, "rounds": args.rounds}, seconds=median, ratios=ratios,
          goals={"whole / half": goal(ratios["whole / half"], least=1.7), "whole / quarter": goal(ratios["whole / quarter"], least=2.5)})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
