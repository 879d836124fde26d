"""One training step of MAE ViT-B/16 (forward, loss, backward, AdamW), ours against transformers, and against our own without masking, in one run.

    python bench/mae_step.py [--rounds 2] [--batch 8] [--json docs/proofs/bench_mae_step.json]

fp32, 224 px, 196 patches of which 147 are hidden, decoder of 8 blocks of width 512, normalised pixels. "without masking": the encoder computes all
196 patches, the decoder and its loss stay the same: what dropping the hidden ones saves. The decoder reads all patches either way, so the
whole step gains less than the encoder; "products" counts the multiplications of both networks and says how much a step could gain at most.
The paper's threefold gain is of the encoder, or of a step with a decoder of one block (its table 2): both are measured beside the whole step. Arms
of one network share its weights. Steps are interleaved, the median is taken. torchvision need not have compiled operators: their names are
declared here, as the tests do.
"""
import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filing import PROOFS, goal, medians, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.nn.masking import take
from polysense.objectives.masked import masked_mse
from polysense.systems.selfsup import mae
from polysense.train.optim import make_optimizer

Built = tuple[Any, torch.optim.Optimizer]


def built(decoder: int) -> Built:
    """MAE ViT-B/16 with a decoder of so many blocks, and its optimiser."""
    preset = mae.vit_b_16().but(**{"config.decoder.body.depth": decoder})
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


def ours(image: torch.Tensor, network: Built) -> Callable[[], float]:
    system, optimizer = network
    return stepping(lambda: system.losses({"image": image}).total(), optimizer)


def unmasked(image: torch.Tensor, network: Built) -> Callable[[], float]:
    """All patches pass the encoder; the decoder then gets the visible ones, as ever."""
    system, optimizer = network

    def loss() -> torch.Tensor:
        masking = system.masking(image)
        tokens = system.encoder(image).tokens
        seen = torch.cat([tokens[:, :1], take(tokens[:, 1:], masking.keep)], 1)
        return masked_mse(system.decoder(seen, masking), system.target(image, masking))
    return stepping(loss, optimizer)


def encoder_only(image: torch.Tensor, network: Built, keep: bool) -> Callable[[], float]:
    """The encoder's share alone, with and without the hidden patches."""
    system, optimizer = network
    return stepping(lambda: system.encoder(image, keep=system.masking(image).keep if keep else None).tokens.square().mean(), optimizer)


def transformers(image: torch.Tensor) -> Callable[[], float]:
    hf = reference("transformers")
    model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(norm_pix_loss=True)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return stepping(lambda: model(image).loss, torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95)))


def products(tokens: int, decoder: int, patches: int = 196, hidden: int = 147) -> float:
    """Multiplications of a forward pass when so many tokens pass the encoder: linears and attention, a block of width D over T tokens being
    12 T D^2 + 2 T^2 D; the last block of the decoder computes queries, MLP and predictions of the hidden patches alone."""
    def block(t: int, d: int) -> int:
        return 12 * t * d ** 2 + 2 * t ** 2 * d

    t, d = patches + 1, 512
    last = 2 * t * d ** 2 + 10 * hidden * d ** 2 + 2 * t * hidden * d
    return 12 * block(tokens, 768) + patches * 768 ** 2 + (patches - hidden + 1) * 768 * d + (decoder - 1) * block(t, d) + last + hidden * d * 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path, default=PROOFS / "bench_mae_step.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    image = torch.randn(args.batch, 3, 224, 224)
    whole, light = built(8), built(1)
    arms = {"ours": ours(image, whole), "transformers": transformers(image), "ours, without masking": unmasked(image, whole),
            "encoder alone": encoder_only(image, whole, True), "encoder alone, without masking": encoder_only(image, whole, False),
            "one-block decoder": ours(image, light), "one-block decoder, without masking": unmasked(image, light)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(args.rounds + 1):
        for name, step in arms.items():
            start = time.process_time()
            step()
            if round_:                       # the first round warms up
                times[name].append(time.process_time() - start)
    seconds = medians(times)
    gain = {name: seconds[f"{name}, without masking"] / seconds[name] for name in ("ours", "encoder alone", "one-block decoder")}
    ratios = {"transformers / ours": seconds["transformers"] / seconds["ours"]} | {f"{k}: without masking / with": v for k, v in gain.items()}
    limit = {f"products without masking / with, decoder of {n}": products(197, n) / products(50, n) for n in (8, 1)}
    write(args.json, what="Processor seconds of a training step of MAE ViT-B/16, fp32; a ratio above 1 is in our favour",
          settings={"batch": args.batch, "rounds": args.rounds, "pixels": 224, "hidden": 147}, seconds=seconds, ratios=ratios,
          goals={"transformers / ours": goal(ratios["transformers / ours"], least=1.1)}
          | {f"{k}: without masking / with": goal(v, least=3.0) for k, v in gain.items()}, notes=limit)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    main()
