"""Which negatives? The hardest of the batch, after a start with all, against one at random; and InfoNCE, which came after.

All arms read the same fixed picture features (each photograph at 8 by 8 pixels: a locked tower that anybody has) through the same towers, batches and
steps; only the loss differs. The score is that of batches of 32: on held-out products of the training part the hardest of 256 lost to one at random,
as among so many of a shop's products the hardest is often the same thing under another title. Batches of 256 stand beside it.
"""
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from polysense.base.batch import Batch
from polysense.base.system import Optim, Preset
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import Source, Subset
from polysense.nn.mlp import MLP
from polysense.proofs.arms import train_arm, words
from polysense.proofs.harness import Outcome
from polysense.systems.align import dual_triplet
from polysense.tasks.retrieval import ranks

METRIC, HIGHER_IS_BETTER = "text to image R@10 among 600 products, hardest negatives of 32 after a warm-up", True
DATA = "fashion_products (train; 600 of dev for the test), pictures as 8x8 pixels"
WARM, STEPS, SIDE = 120, 480, 8


def looked(data: Source, preset: Preset) -> torch.Tensor:
    """[N,192], standardised by eye: pixels of the feed have about unit deviation."""
    return torch.cat([adaptive_avg_pool2d(b["image"], SIDE).flatten(1) for b in Loader(
        data, preset.feed, None, batch_size=250, train=False, needs=("image",))]).clone()


def plan(policy: str, batch: int) -> Preset:
    base = dual_triplet.tiny()
    config = base.config.but(image_head=MLP.Config(width=3 * SIDE ** 2, hidden=256, out=128), policy=policy)
    if policy == "info_nce":
        config = config.but(policy="sum")
    stages = dual_triplet.stages(WARM, STEPS, batch, Optim(lr=2e-3, clip=2.0), ("text.*", "image_head.*"))
    if policy == "info_nce":
        both = dual_triplet.DualTriplet
        stages = tuple(s.but(objective=both.compare, embed=both.embed, trainable=("text.*", "image_head.*", "log_scale")) for s in stages)
    return base.but(config=config, stages=stages)


def batches(features: torch.Tensor, texts: list[list[str]], tokenizer: Any, size: int, seed: int) -> Iterator[Batch]:
    g = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(features), generator=g).split(size):
            if len(rows) == size:
                pick = torch.rand(size, generator=g)
                said = [texts[i][int(p * len(texts[i]))] for i, p in zip(rows.tolist(), pick.tolist(), strict=True)]
                yield {"features": features[rows], "text": tokenizer(said), "index": rows}


def run(seed: int, test: Source | None = None, train: Source | None = None) -> Outcome:
    train = source("fashion_products") if train is None else train
    test = source("fashion_products", split="dev") if test is None else test
    test = Subset(test, range(min(600, len(test))))
    base = dual_triplet.tiny()
    tokenizer, features, seen = words(base, train), looked(train, base), looked(test, base)
    texts, asked = [train.about(i)["captions"] for i in range(len(train))], [test.about(i)["captions"][0] for i in range(len(test))]
    owner, found = torch.arange(len(test)).numpy(), {}
    for batch in (32, 256):
        for policy in ("random", "sum", "semi_hard", "hardest", "info_nce"):
            of = plan(policy, batch) if batch == 32 else plan(policy, batch).but(**{"stages.0.steps": WARM // 2, "stages.1.steps": STEPS // 4})
            system = train_arm("dual_triplet", of, train, needs=("text",), seed=seed, tokenizer=tokenizer,
                               batches=batches(features, texts, tokenizer, batch, seed)).subject.system
            with torch.inference_mode():
                rank = ranks(system.from_features(seen), system.encode_text(tokenizer(asked)), owner)[1]
            found[f"{policy}, batch {batch}"] = float((rank <= 10).mean())
    return Outcome(found.pop("hardest, batch 32"), {"random negatives": found.pop("random, batch 32")}, found)
