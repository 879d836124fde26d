"""A map of outlines steers a frozen text-to-image model: what is drawn has its edges where they were asked for.

Baselines: the frozen model with the same words and noise, and a control trained on the outlines of other pictures. Edges are found in the drawn
pictures by their colour gradient, and counted right within one pixel. Sized on other seeds. The base is as small as the budget and trained for
this proof; depth and segments are other values of one option of the data and are not measured. The notes say how much of the edges the
auto-encoder keeps: no arm can do better.
"""
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.latent_diffusion import LatentDiffusion
from polysense.base.system import Preset, System
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import ListSource, Source
from polysense.proofs.arms import train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.latent_diffusion import plan
from polysense.systems.generate import controlnet
from polysense.systems.generate.controlnet import ControlNet

METRIC, HIGHER_IS_BETTER = "F1 of edges drawn where the map has them (within one pixel)", True
SPEC = "scenes?style=plain&size=32&objects=1&digits=0&shapes=4&colours=4&hint=edges"
DATA = "scenes of one thing at 32 px, plain, with outlines (3,000 train, 96 test)"
COMPRESS, DENOISE, CONTROL, COUNT = 400, 250, 250, 96


class Elsewhere(ListSource):
    """The same captioned pictures, each with the map of another one."""

    def __init__(self, base: Source):
        n = len(base)
        super().__init__(base.name, [{"id": base.id(i), "captions": base.about(i)["captions"]} for i in range(n)], base.offers)
        self.base = base

    def heavy(self, i: int) -> tuple[str, ...]:
        return ("image", "hint")

    def _load(self, i: int, key: str) -> object:
        return self.base.load((i + len(self.base) // 2) % len(self.base) if key == "hint" else i, key)


def lent_fields(config: LatentDiffusion.Config) -> dict[str, Any]:
    """The fields that every system on a latent diffusion model shares with it."""
    return {f.name: getattr(config, f.name) for f in fields(LatentDiffusion.Config)}


def control_plan(base: Preset, steps: int) -> Preset:
    """ControlNet on the model of `base`."""
    shared, tiny = lent_fields(base.config) | {"drop": 0.5}, controlnet.tiny()
    return tiny.but(config=ControlNet.Config(**shared, hint_widths=(16, 32, 32)), starts=()).but(**{
        "feed.text": base.feed.text, "stages.0.steps": steps, "stages.0.batch_size": 32, "stages.0.optim.lr": 1e-3, "stages.0.ema": 0.98})


def edges(image: Tensor) -> Tensor:
    """image [B,3,H,W] in [-1,1] -> bool [B,H,W]: where neighbours two pixels apart differ by more than a quarter of the range."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    across, down = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2], padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return (across.square() + down.square()).sum(1).sqrt() > 0.5


def agreement(drawn: Tensor, hint: Tensor) -> float:
    """Mean over pictures of the F1 of edges [B,3,H,W], [B,3,H,W]; a neighbour's edge counts."""
    got, asked = edges(drawn), hint.mean(1) > 0.3
    near = lambda m: F.max_pool2d(m.float()[:, None], 3, 1, 1)[:, 0] > 0
    share = lambda a, b: (a & b).flatten(1).sum(1) / a.flatten(1).sum(1).clamp_min(1)
    precision, recall = share(got, near(asked)), share(asked, near(got))
    return float((2 * precision * recall / (precision + recall).clamp_min(1e-6)).mean())


def compare(seed: int, test_seed: int, compress: int = COMPRESS, denoise: int = DENOISE, control: int = CONTROL) -> Outcome:
    train, base = source(f"{SPEC}&n=3000&seed={seed}"), plan(compress, denoise)
    tokenizer = words(base, train)
    learned = train_arm("latent_diffusion", base, train, needs=("image", "text"), seed=seed, tokenizer=tokenizer).subject.system
    preset = control_plan(base, control)

    def lend(system: System) -> None:
        state = learned.state_dict()
        system.load_state_dict({k: v for k, v in state.items() if k in system.state_dict()}, strict=False)

    def arm(data: Source) -> ControlNet:
        return train_arm("controlnet", preset, data, needs=("image", "text", "hint"), seed=seed, tokenizer=tokenizer, prepare=lend).subject.system

    test = source(f"{SPEC}&n={COUNT}&seed={test_seed}&captions=1", split="test")
    batch = next(iter(Loader(test, preset.feed, tokenizer, batch_size=COUNT, train=False, needs=("image", "text", "hint"))))
    honest, astray = arm(train), arm(Elsewhere(train))

    def draw(system: LatentDiffusion, **hint: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return system.generate_image(batch["text"], steps=15, **hint)

    given = {"hint": batch["hint"]}
    scores = {"own": draw(honest, **given), "base": draw(honest), "astray": draw(astray, **given)}
    told = {k: agreement(v, batch["hint"]) for k, v in scores.items()}
    return Outcome(told["own"], {"the base, without the map": told["base"], "trained on the maps of other pictures": told["astray"]}, {
        "F1 of the real pictures": agreement(batch["image"], batch["hint"]),
        "F1 of what the auto-encoder keeps of them": agreement(honest.reconstruct(batch["image"]).detach(), batch["hint"])})


def run(seed: int) -> Outcome:
    return compare(seed, 1001)
