"""A small classifier trained on real pictures, as the judge of drawn ones: do they show what was asked for, and how far are its features off?"""
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.plan import Feed, Preset
from polysense.data.loader import Loader
from polysense.data.sources import Source
from polysense.nn.head import Linear
from polysense.nn.residual import CIFAR_STEM, Basic
from polysense.systems.align import clip
from polysense.towers.clip_text import ClipText
from polysense.towers.resnet import ResNet


def small_clip(of: Preset, text: ClipText.Config, base: int, steps: int) -> Preset:
    """A CLIP of a few layers that reads the pictures and the tokens of another preset."""
    vision = ResNet.Config(layers=(1, 1, 1), base=base, block=Basic.Config(), stem=CIFAR_STEM)
    config = clip.CLIP.Config(vision=vision, text=text, image_head=Linear.Config(into=vision.width, out=64),
                              text_head=Linear.Config(into=text.width, out=64))
    return clip.tiny().but(config=config, feed=of.feed, **{"stages.0.steps": steps, "stages.0.batch_size": 64, "stages.0.optim.warmup": 10})


class Judge(nn.Module):
    """Three strided convolutions with batch norm, their mean, a dense layer."""

    def __init__(self, classes: int, width: int = 48):
        super().__init__()
        widths = (3, width, width, 2 * width)
        self.convs = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)))
        self.head = nn.Linear(2 * width, classes)

    def features(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,D], the layer before the last."""
        return self.convs(image).flatten(2).amax(2)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


def labelled(source: Source, feed: Feed, batch_size: int, train: bool, seed: int = 0) -> Iterator[Any]:
    return iter(Loader(source, feed, None, batch_size=batch_size, seed=seed, train=train, needs=("image", "label")))


def train_judge(source: Source, feed: Feed, classes: int, steps: int, seed: int, batch_size: int = 64) -> Judge:
    """A judge of pictures that are read as `feed` says."""
    torch.manual_seed(seed)
    judge = Judge(classes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _, batch in zip(range(steps), labelled(source, feed, batch_size, True, seed)):
        loss = F.cross_entropy(judge(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.inference_mode()
def agreement(judge: Judge, image: Tensor, label: Tensor) -> float:
    """Share of the pictures that the judge puts into the class that was asked for."""
    return float((judge(image).argmax(1) == label).float().mean())


@torch.inference_mode()
def frechet(judge: Judge, one: Tensor, two: Tensor) -> float:
    """Frechet distance of two sets of pictures in the judge's features: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    f, g = (judge.features(x).double() for x in (one, two))
    c, d = f.T.cov(), g.T.cov()
    root = torch.linalg.eigvals(c @ d).real.clamp_min(0).sqrt().sum()
    return float((f.mean(0) - g.mean(0)).square().sum() + c.trace() + d.trace() - 2 * root)
