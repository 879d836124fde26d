"""FILIP's contrast in tiles against the dense form: largest memory, time, and how far the gradients differ, in one run.

    python bench/token_similarity.py [--batch 128] [--json docs/proofs/bench_token_similarity.json]

196 patches and 32 words of width 64 each. The dense form holds all token pairs of the batch at once; each form runs in a process of its own, whose
peak of resident memory above its start is what is reported.
"""
import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filing import PROOFS, goal, write

from polysense.objectives.tokenwise import token_nce

PATCHES, WORDS, WIDTH, SCALE = 196, 32, 64, 14.3


def samples(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    patches, words = (F.normalize(torch.randn(batch, n, WIDTH, generator=g), dim=-1).requires_grad_() for n in (PATCHES, WORDS))
    return patches, words, torch.arange(WORDS) < torch.randint(8, WORDS + 1, (batch, 1), generator=g)


def dense(patches: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    dots = torch.einsum("ikd,jld->ijkl", patches, words).masked_fill(~mask[:, None], -torch.inf)
    see = dots.amax(3).mean(2)
    say = (dots.amax(2).masked_fill(~mask, 0.0).sum(2) / mask.sum(1)).T
    target = torch.arange(len(patches))
    return (F.cross_entropy(SCALE * see, target) + F.cross_entropy(SCALE * say, target)) / 2


def measure(form: str, batch: int, out: Any) -> None:
    torch.set_num_threads(1)
    patches, words, mask = samples(batch)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    loss = dense(patches, words, mask) if form == "dense" else token_nce(patches, words, mask, SCALE)
    loss.backward()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert patches.grad is not None and words.grad is not None
    out.put((used / 1024, time.perf_counter() - start, float(loss.detach()), patches.grad.numpy(), words.grad.numpy()))


def alone(form: str, batch: int) -> Any:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=measure, args=(form, batch, out))
    process.start()
    found = out.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path, default=PROOFS / "bench_token_similarity.json")
    args = parser.parse_args()
    tiled, whole = alone("tiled", args.batch), alone("dense", args.batch)
    twice = alone("tiled", 2 * args.batch)
    apart = max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(tiled[3:], whole[3:], strict=True))
    ratios = {"memory, dense / tiled": whole[0] / tiled[0], "memory, tiled: twice the batch / the batch": twice[0] / tiled[0],
              "time, dense / tiled": whole[1] / tiled[1]}
    write(args.json, what="FILIP's contrast in tiles: seconds forward and backward; memory beyond what was held before",
          settings={"batch": args.batch, "patches": PATCHES, "words": WORDS, "width": WIDTH}, ratios=ratios,
          seconds={"tiled": tiled[1], "dense": whole[1]},
          goals={"memory, tiled: twice the batch / the batch": goal(ratios["memory, tiled: twice the batch / the batch"], most=2.0),
                 "largest difference of the gradients, relative": goal(apart, most=1e-4)},
          notes={
              "MB, tiled": tiled[0], "MB, dense": whole[0], "MB, tiled, twice the batch": twice[0], "loss, tiled": tiled[2], "loss, dense": whole[2]})


if __name__ == "__main__":
    main()
