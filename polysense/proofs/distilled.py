"""What the proofs of students that hide patches from themselves share: handwriting, and a vision transformer small enough for it."""
from types import ModuleType
from typing import Any

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import Source
from polysense.proofs.arms import rest_of, some_of


def handwriting(seed: int, part: str) -> tuple[Source, Source]:
    """3,000 training pictures, and 1,000 to examine: those that no choice was made on, or of part "dev" others."""
    held = source("mnist", split="test")
    return some_of(source("mnist"), 3000, seed), some_of(held, 1000, 0) if part == "dev" else some_of(rest_of(held, 2000, 0), 1000, 0)


def small(recipe: ModuleType) -> Preset:
    """The tiny preset of a recipe, with three blocks on patches of 8 pixels, for 300 steps, and views that leave a digit what it is."""
    plan: Preset = recipe.tiny()
    feed: Any = plan.feed
    view, crop = feed.views[0].but(flip=0.0), feed.crops[0].but(flip=0.0, scale=(0.2, 0.5))           # a mirrored digit is another
    return plan.but(**{
        "feed.views": (view, view), "feed.crops": (crop,) * 2, "config.backbone.patch": 8, "config.backbone.body.depth": 3,
        "config.sampler.blocks.least": 1, "config.teacher.momentum": 0.97, "config.warming": 1.0, "config.still": 0.0,
        "stages.0.steps": 300, "stages.0.optim.warmup": 30, "stages.0.optim.lr": 2e-3, "stages.0.optim.final_decay": 0.04})
