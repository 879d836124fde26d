"""The plans that UniCL and those who learn like it share: Swin beside CLIP's text tower, pictures with texts and labels, one contrastive loss."""
from typing import Any

from polysense.archetypes.dual_encoder import DualEncoder
from polysense.base.plan import ImagePlan, Optim, Preset, Stage, TextPlan, ViewPlan
from polysense.base.telling import Telling, ToldFeed
from polysense.towers.shapes import TINY_SWIN, swin_pair
from polysense.towers.swin import Swin

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BATCH = 4096


def tiny_plan(owner: type[DualEncoder], data: str, told: tuple[Telling, ...], length: int) -> Preset:
    """Pictures of 64 pixels, texts of `length` tokens."""
    return Preset(
        data=data, config=owner.Config(**swin_pair(TINY_SWIN, (128, 3, 2), 128, 4096, length, 2)),
        feed=ToldFeed(image=ImagePlan(size=64), train_image=ViewPlan(size=64, scale=(0.6, 1.0), flip=0.5), text=TextPlan(vocab=4096, length=length),
                      told=told),
        stages=(Stage(objective=owner.compare_labelled, embed=owner.embed_labelled, steps=400, batch_size=128,
                      optim=Optim(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup=40, clip=1.0)),))


def paper_plan(owner: type[DualEncoder], data: str, told: tuple[Telling, ...], samples: int) -> Preset:
    """Swin-T, 32 epochs of batch 4096, 5 of them warm-up (Yang et al. 2022, section 4)."""
    epoch = samples // BATCH
    return Preset(
        data=data, config=owner.Config(**swin_pair(Swin.Config(drop_path=0.2), (512, 12, 8), 512)),
        feed=ToldFeed(image=ImagePlan(size=224, **IMAGENET), train_image=ViewPlan(size=224, scale=(0.08, 1.0), flip=0.5),
                      text=TextPlan(vocab=49_408, length=77, pad="zero"), told=told),
        stages=(Stage(objective=owner.compare_labelled, embed=owner.embed_labelled, steps=32 * epoch, batch_size=BATCH,
                      optim=Optim(lr=5e-4, weight_decay=0.1, warmup=5 * epoch)),))
