"""One training step of CLIP ViT-B/32 (forward, loss, backward, AdamW), ours against open_clip and transformers, in one run.

    python bench/clip_step.py [--rounds 3] [--batch 32] [--json docs/proofs/bench_clip_step.json]

Same shapes of weights, pictures, captions (of real length where the data are there) and optimiser. The peers read what their tokenisers
give: 77 positions (open_clip always; transformers with `padding="max_length"`, and `padding=True`, the longest of the batch, as "trimmed").
Ours reads the batch trimmed to its longest caption, which changes no feature. Steps are interleaved, the median is taken, only ratios count.
timm, open_clip and torchvision need not have compiled operators: their names are declared here, as the tests do.
"""
import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.proofs.harness import commit, machine
from polysense.systems.align import clip
from polysense.train.optim import make_optimizer

CAPTIONS = [
    "A man riding a wave on top of a surfboard.", "Two dogs play in the snow near a wooden fence.", "A plate of food with broccoli and rice.",
    "The bathroom has a white toilet, a sink and a large mirror above it.", "A red double decker bus drives down a city street.",
    "Children watch as a train full of tourists comes into the small station.", "A cat sleeps on a laptop.", "Several kites fly over a beach."]


def captions(n: int) -> list[str]:
    """Human captions where the data are there, else eight of the same length."""
    try:
        from polysense.data import source
        return [c for _, c in zip(range(n), source("natural_captions").captions())]
    except Exception:
        return (CAPTIONS * n)[:n]


def ours(image: torch.Tensor, ids: torch.Tensor, bf16: bool) -> Callable[[], float]:
    preset = clip.vit_b_32()
    system, stage = preset.config.build().train(), preset.stages[0]
    optimizer = make_optimizer(system, stage.optim)
    longest = int(ids.argmax(1).max()) + 1

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = stage.objective(system, stage.embed(system, {"image": image, "text": ids[:, :longest]})).total()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())
    return step


def peer(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], bf16: bool) -> Callable[[], float]:
    model.train()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())
    return step


def open_clip(image: torch.Tensor, ids: torch.Tensor, bf16: bool) -> Callable[[], float]:
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    model = CLIP(512, CLIPVisionCfg(layers=12, width=768, patch_size=32, image_size=224), CLIPTextCfg(width=512, heads=8, layers=12), quick_gelu=True)
    loss = ClipLoss()
    return peer(model, lambda: loss(*model(image, ids)), bf16)


def transformers(image: torch.Tensor, ids: torch.Tensor, bf16: bool) -> Callable[[], float]:
    from transformers import CLIPConfig, CLIPModel
    model = CLIPModel(CLIPConfig())
    return peer(model, lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=image, return_loss=True).loss, bf16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, default=Path("docs/proofs/bench_clip_step.json"))
    args = parser.parse_args()
    reference("open_clip")                   # declares torchvision's compiled operators where they are absent
    from open_clip import SimpleTokenizer
    torch.manual_seed(0)
    image, ids = torch.randn(args.batch, 3, 224, 224), SimpleTokenizer()(captions(args.batch))
    longest = int(ids.argmax(1).max()) + 1
    arms = {"ours": (ours, ids), "open_clip": (open_clip, ids), "transformers": (transformers, ids),
            "transformers, trimmed": (transformers, ids[:, :longest])}
    seconds: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        steps = {name: build(image, text, precision == "bf16") for name, (build, text) in arms.items()}
        for round_ in range(args.rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if round_:                   # the first round warms up
                    seconds.setdefault(f"{name} {precision}", []).append(time.perf_counter() - start)
        del steps
        gc.collect()
    median = {name: statistics.median(v) for name, v in seconds.items()}
    ratios = {f"{name} / ours, {p}": median[f"{name} {p}"] / median[f"ours {p}"] for p in ("fp32", "bf16") for name in arms if name != "ours"}
    ratios |= {f"{name} fp32 / ours bf16 (defaults)": median[f"{name} fp32"] / median["ours bf16"] for name in ("open_clip", "transformers")}
    result = {"what": "CLIP ViT-B/32 training step; a ratio above 1 is in our favour", "batch": args.batch,
              "tokens": {"theirs": ids.shape[1], "ours": longest}, "machine": machine(), "commit": commit(), "seconds": median, "ratios": ratios}
    for name, value in [*median.items(), *ratios.items()]:
        print(f"{name:45s} {value:8.2f}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
