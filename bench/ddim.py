"""Guided DDIM sampling with a U-Net of latent diffusion, ours against diffusers: the same weights, noise, words and steps, fp32.

    python bench/ddim.py [--rounds 5] [--steps 4] [--width 128] [--json docs/proofs/bench_ddim.json]

Both sides run their own network and their own scheduler on one doubled batch a step. The results are compared first (largest difference printed).
Runs are interleaved, the median is taken, only the ratio counts. The network has Stable Diffusion's shape (three levels that read words, one that
does not, two blocks each) at a smaller width.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import torch
from filing import PROOFS, goal, medians, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.archetypes.stable_diffusion import unet
from polysense.objectives import samplers
from polysense.objectives.diffusion import betas, guided, kept_share, understood
from polysense.weights import unet_diffusers
from polysense.weights.keymap import load_into

GUIDANCE, WORDS = 7.5, 77


@torch.inference_mode()
def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("steps", 4), ("width", 128), ("side", 32), ("batch", 1), ("source", 256)):
        args.add_argument(f"--{name}", type=int, default=default)
    args.add_argument("--json", type=Path, default=PROOFS / "bench_ddim.json")
    o = args.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    diffusers, w = reference("diffusers"), o.width
    seeing = "CrossAttnDownBlock2D"
    theirs = diffusers.UNet2DConditionModel(
        sample_size=o.side, in_channels=4, out_channels=4, block_out_channels=(w, 2 * w, 4 * w, 4 * w), cross_attention_dim=o.source,
        attention_head_dim=8, down_block_types=(seeing, seeing, seeing, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)).eval()
    config = unet((w, 2 * w, 4 * w, 4 * w), (0, 1, 2), o.source)
    ours = config.build().eval()
    load_into(ours, unet_diffusers.keymap(config), theirs.state_dict())
    torch.manual_seed(0)
    noise, context = torch.randn(o.batch, 4, o.side, o.side), torch.randn(2 * o.batch, WORDS, o.source)
    kept = kept_share(betas("scaled_linear", 1000, 8.5e-4, 0.012))
    scheduler = diffusers.DDIMScheduler(beta_start=8.5e-4, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)

    def draw_ours() -> torch.Tensor:
        def denoise(z: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
            free, given = ours(torch.cat([z, z]), torch.tensor(t), context).chunk(2)
            return understood(guided(free, given, GUIDANCE), z, kept[t].view(1))
        *_, out = samplers.ddim(denoise, noise, kept, samplers.times(1000, o.steps))
        return out

    def draw_theirs() -> torch.Tensor:
        scheduler.set_timesteps(o.steps)
        z = noise
        for t in scheduler.timesteps:
            free, given = theirs(torch.cat([z, z]), t, context, return_dict=False)[0].chunk(2)
            z = scheduler.step(free + GUIDANCE * (given - free), t, z, return_dict=False)[0]
        return z

    gap = float((draw_ours() - draw_theirs()).abs().max())
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for _ in range(o.rounds):
        for name, draw in (("ours", draw_ours), ("diffusers", draw_theirs)):
            begun = time.process_time()
            draw()
            seconds[name].append(time.process_time() - begun)
    median = medians(seconds)
    ratio = median["diffusers"] / median["ours"]
    write(o.json, what="Processor seconds of guided DDIM sampling with a U-Net of latent diffusion, fp32; a ratio above 1 is in our favour",
          settings={"steps": o.steps, "batch": o.batch, "latents": o.side, "width": w, "rounds": o.rounds,
                    "parameters": sum(p.numel() for p in ours.parameters())},
          seconds=median, ratios={"diffusers / ours": ratio}, goals={"diffusers / ours": goal(ratio, least=1.0)}, notes={"largest difference": gap})


if __name__ == "__main__":
    main()
