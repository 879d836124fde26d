"""Training CLIP on small real data in equal wall-clock time: open_clip's model and loss in a plain loop, ours with equal towers, our defaults.

    python bench/clip_small.py [--seconds 120] [--data natural_captions fashion_products] [--seeds 0] [--json docs/proofs/bench_clip_small.json]

All arms read the same loader (same pictures, same crops), train for the same time on this machine, one after the other, and are examined by
the same exam: retrieval on the dev pictures, R@10 both ways. Arms:

    open_clip   open_clip.model.CLIP (ViT 6x192 patch 8 at 64 px, text 6x192, its tokenizer, 77 positions), ClipLoss, AdamW, fp32, plain loop
    equal       our CLIP with those towers, that vocabulary, batch, crops, optimiser and schedule; our loop (bfloat16 where the hardware has it)
    tiny        `polysense train clip` as it comes
"""
import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.base.system import Optim, Preset, ViewPlan
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.tokenizer import load_tokenizer
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import commit, machine
from polysense.systems.align import clip
from polysense.tasks import take

BATCH, LR = 128, 1e-3
CROPS = ViewPlan(size=64, scale=(0.9, 1.0))


def equal_preset() -> Preset:
    """Our CLIP with the peer's towers, crops, optimiser and batch."""
    config = clip.config(64, 8, clip.body(192, 6, 3), clip.body(192, 6, 3), dim=192)
    optim = Optim(lr=LR, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, warmup=20)
    return clip.tiny().but(config=config).but(**{"feed.train_image": CROPS, "feed.text.vocab": 49408, "feed.text.length": 77,
                                                 "stages.0.optim": optim, "stages.0.batch_size": BATCH})


def ours(preset: Preset, train: Any, seconds: float, seed: int, tokenizer: Any = None) -> tuple[Any, int]:
    start = time.perf_counter()
    arm = train_arm("clip", preset.but(**{"stages.0.steps": 100_000}), train, needs=("image", "text"), seed=seed, tokenizer=tokenizer,
                    clock=lambda: min(1.0, (time.perf_counter() - start) / seconds))
    return arm.subject, len(arm.losses)


class Peer:
    """open_clip's model as the exams' subject."""

    def __init__(self, model: torch.nn.Module, words: Any, reader: Any):
        self.system, self.preset, self.tokenizer, self.device = self, equal_preset(), words, torch.device("cpu")
        self.model, self.id, self.reader = model, "open_clip", reader

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.encode_image(image), dim=-1)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.encode_text(text), dim=-1)

    def read_images(self, images: list[Any]) -> torch.Tensor:
        return self.reader(images)

    def read_texts(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(list(texts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


def open_clip(train: Any, seconds: float, seed: int) -> tuple[Any, int]:
    from open_clip import SimpleTokenizer
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    from polysense.data.images import read_images
    torch.manual_seed(seed)
    pick, words = random.Random(seed), SimpleTokenizer()
    model = CLIP(192, CLIPVisionCfg(layers=6, width=192, head_width=64, patch_size=8, image_size=64),
                 CLIPTextCfg(context_length=77, width=192, heads=3, layers=6), quick_gelu=True).train()
    loss_of, preset = ClipLoss(), equal_preset()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": decay, "weight_decay": 0.2}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    start, steps = time.perf_counter(), 0
    for batch in Loader(train, preset.feed, None, batch_size=BATCH, seed=seed, needs=("image",)):
        done = (time.perf_counter() - start) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (steps + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
        text = words([pick.choice(train.about(i)["captions"]) for i in batch["index"].tolist()])
        loss = loss_of(*model(batch["image"], text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        steps += 1
    return Peer(model.eval(), words, lambda images: read_images(preset.feed.image, images)), steps


def scores(subject: Any, dev: Any) -> dict[str, float]:
    metrics = take("retrieval", subject, dev).metrics
    return {k: float(metrics[k].value) for k in ("text_to_image_r10", "image_to_text_r10")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--data", nargs="+", default=["natural_captions", "fashion_products"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", default=["open_clip", "equal", "tiny"])
    parser.add_argument("--json", type=Path, default=Path("docs/proofs/bench_clip_small.json"))
    args = parser.parse_args()
    reference("open_clip")                   # declares torchvision's compiled operators where they are absent
    import open_clip as package
    vocabulary = load_tokenizer(Path(package.__file__).parent, equal_preset().feed.text)
    rows = []
    for name in args.data:
        train, dev = source(name), source(name, split="dev")
        for seed in args.seeds:
            runs = {"open_clip": lambda t=train, s=seed: open_clip(t, args.seconds, s),
                    "equal": lambda t=train, s=seed: ours(equal_preset(), t, args.seconds, s, vocabulary),
                    "tiny": lambda t=train, s=seed: ours(clip.tiny(), t, args.seconds, s)}
            for arm in args.arms:
                subject, steps = runs[arm]()
                rows.append({"data": name, "arm": arm, "seed": seed, "steps": steps, **scores(subject, dev)})
                print(rows[-1], flush=True)
    mean = {(d, a): sum(r["text_to_image_r10"] + r["image_to_text_r10"] for r in rows if (r["data"], r["arm"]) == (d, a)) / (2 * len(args.seeds))
            for d in args.data for a in args.arms}
    ratios = {f"{a} / open_clip, {d}": mean[d, a] / max(mean[d, "open_clip"], 1e-9) for d in args.data for a in args.arms
              if a != "open_clip" and "open_clip" in args.arms}
    print(*(f"{k:40s} {v:.2f}" for k, v in ratios.items()), sep="\n")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    filed = {"what": "mean R@10 of both directions on the dev pictures after equal seconds of training", "seconds": args.seconds,
             "machine": machine(), "commit": commit(), "runs": rows, "ratios": ratios}
    args.json.write_text(json.dumps(filed, indent=1) + "\n")


if __name__ == "__main__":
    main()
