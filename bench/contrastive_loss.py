"""The tiled InfoNCE against the plain dense one: time, memory above the inputs, gradients. Files docs/proofs/bench_contrastive_loss.json.

Every measurement runs in a child process of its own. Memory is the highest resident set (VmHWM, reset through /proc/self/clear_refs once
the inputs stand and the libraries are warm) minus the resident set at that moment. Times are the best of the rounds; dense and tiled take
turns, so that a busy machine hits both. Usage: python bench/contrastive_loss.py [--rows 16384] [--json PATH]
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.objectives import tiled
from polysense.objectives.contrastive import info_nce
from polysense.proofs.harness import commit, machine

WIDTH, SCALE = 512, 1 / 0.07
OUT = Path(__file__).parents[1] / "docs" / "proofs" / "bench_contrastive_loss.json"


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As everybody writes it."""
    logits, target = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that agree in part, as they do in training; the scale of CLIP at its start."""
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(rows, WIDTH, generator=g), torch.randn(rows, WIDTH, generator=g)
    text = F.normalize(image * 0.3 + text, dim=-1)
    return F.normalize(image, dim=-1).requires_grad_(), text.requires_grad_(), torch.tensor(SCALE, requires_grad=True)


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process in MB (10^6 bytes)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def measure(which: str, rows: int) -> dict[str, float]:
    """One loss with its backward: seconds, and megabytes above the inputs (their gradients count as above)."""
    loss = {"dense": dense, "tiled": info_nce}[which]
    loss(*inputs(2200)).backward()
    values = inputs(rows)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    value = loss(*values)
    value.backward()
    return {"seconds": time.perf_counter() - started, "megabytes": resident("VmHWM") - before, "loss": value.item()}


def in_child(which: str, rows: int, threads: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--measure", which, "--rows", str(rows), "--threads", str(threads)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def gradient_error(rows: int) -> float:
    """Largest relative difference |ours - dense| / |dense| (norms) over the gradients of image, text and scale."""
    values, kept = inputs(rows), tiled.SMALL
    tiled.SMALL = 0                                                  # at this size the matrix would be one tile: ask for many
    ours = torch.autograd.grad(info_nce(*values), values)
    tiled.SMALL = kept
    both = zip((*ours, *torch.autograd.grad(info_nce(*values), values)), 2 * torch.autograd.grad(dense(*values), values), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in both)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rows", type=int, default=16_384)
    ask.add_argument("--large", type=int, default=32_768, help="rows that need only complete (0: leave out)")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--threads", type=int, default=torch.get_num_threads())
    ask.add_argument("--json", type=Path, default=OUT)
    ask.add_argument("--measure", choices=["dense", "tiled"], help=argparse.SUPPRESS)
    said = ask.parse_args()
    torch.set_num_threads(said.threads)
    if said.measure:
        print(json.dumps(measure(said.measure, said.rows)))
        return
    rounds = [{which: in_child(which, said.rows, said.threads) for which in ("dense", "tiled")} for _ in range(said.rounds)]
    best = {which: {k: min(r[which][k] for r in rounds) if k == "seconds" else max(r[which][k] for r in rounds)
                    for k in ("seconds", "megabytes", "loss")} for which in ("dense", "tiled")}
    result = {"id": "bench_contrastive_loss", "commit": commit(), "machine": machine(), "rows": said.rows, "width": WIDTH, "dtype": "float32",
              "rounds": rounds, **best, "speed_up": best["dense"]["seconds"] / best["tiled"]["seconds"],
              "memory_ratio": best["dense"]["megabytes"] / best["tiled"]["megabytes"],
              "gradient_error_at_2048": gradient_error(2048), "large": None}
    if said.large:
        result["large"] = {"rows": said.large, **in_child("tiled", said.large, said.threads)}
    result["holds"] = {"memory_below_400_MB": best["tiled"]["megabytes"] < 400, "no_slower_than_dense": result["speed_up"] >= 1,
                       "gradients_within_1e-5": result["gradient_error_at_2048"] < 1e-5, "large_completes": bool(result["large"])}
    said.json.parent.mkdir(parents=True, exist_ok=True)
    said.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
