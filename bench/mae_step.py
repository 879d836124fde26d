"""One training step of MAE ViT-B/16 (forward, loss, backward, AdamW), ours against transformers, and against our own without masking, in one run.

    python bench/mae_step.py [--rounds 3] [--batch 4] [--json docs/proofs/bench_mae_step.json]

fp32, 224 px, 196 patches of which 147 are hidden, decoder of 8 blocks of width 512, normalised pixels. "without masking": the encoder computes all
196 patches, the decoder and its loss stay the same: what dropping the hidden ones saves. Steps
are interleaved, the median is taken, only ratios count. torchvision need not have compiled operators: their names are declared here, as the tests do.
"""
import argparse
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

from polysense.nn.masking import take
from polysense.objectives.masked import masked_mse
from polysense.proofs.harness import commit, machine
from polysense.systems.selfsup import mae
from polysense.train.optim import make_optimizer


def built() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    preset = mae.vit_b_16()
    system = preset.config.build().train()
    return system, make_optimizer(system, preset.stages[0].optim)


def stepping(loss_of: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())
    return step


def ours(image: torch.Tensor) -> Callable[[], float]:
    system, optimizer = built()
    return stepping(lambda: system.losses({"image": image}).total(), optimizer)


def unmasked(image: torch.Tensor) -> Callable[[], float]:
    """All patches pass the encoder; the decoder then gets the visible ones, as ever."""
    system, optimizer = built()

    def loss() -> torch.Tensor:
        masking = system.masking(image)
        tokens = system.encoder(image).tokens
        seen = torch.cat([tokens[:, :1], take(tokens[:, 1:], masking.keep)], 1)
        return masked_mse(system.decoder(seen, masking), system.target(image, masking))
    return stepping(loss, optimizer)


def encoder_only(image: torch.Tensor, keep: bool) -> Callable[[], float]:
    """The encoder's share alone, with and without the hidden patches."""
    system, optimizer = built()
    return stepping(lambda: system.encoder(image, keep=system.masking(image).keep if keep else None).tokens.square().mean(), optimizer)


def transformers(image: torch.Tensor) -> Callable[[], float]:
    hf = reference("transformers")
    model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(norm_pix_loss=True)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return stepping(lambda: model(image).loss, torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("docs/proofs/bench_mae_step.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, 224, 224)
    arms = {"ours": ours(image), "transformers": transformers(image), "ours, without masking": unmasked(image),
            "encoder alone": encoder_only(image, True), "encoder alone, without masking": encoder_only(image, False)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(args.rounds + 1):
        for name, step in arms.items():
            start = time.perf_counter()
            step()
            if round_:                       # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(v) for name, v in seconds.items()}
    ratios = {"transformers / ours": median["transformers"] / median["ours"],
              "ours without masking / ours": median["ours, without masking"] / median["ours"],
              "encoder without masking / encoder": median["encoder alone, without masking"] / median["encoder alone"]}
    result = {"what": "MAE ViT-B/16 training step, fp32; a ratio above 1 is in our favour", "batch": args.batch, "rounds": args.rounds,
              "load": os.getloadavg()[0], "machine": machine(), "commit": commit(), "seconds": median, "ratios": ratios}
    for name, value in [*median.items(), *ratios.items()]:
        print(f"{name:45s} {value:8.2f}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
