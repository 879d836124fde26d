"""What the proofs of masked picture models share: photographs in memory, and what is known of a hidden patch without any model."""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from polysense.base.batch import Batch
from polysense.base.system import Preset, System
from polysense.data import source
from polysense.data.sources import Source, Subset
from polysense.nn.masking import Masking, take
from polysense.pipeline import Pipeline
from polysense.proofs.arms import Arm, exam, read_all, rest_of, some_of, train_arm
from polysense.proofs.small import pair, plain_clip
from polysense.train.starts import carry

PHOTOS = "tiny_imagenet40"


def photos(preset: Preset, count: int, seed: int, part: str = "test") -> tuple[Tensor, Tensor, Source]:
    """Random training photographs [n,3,H,W] as the preset reads them, the unseen ones, and the former as a source."""
    train = some_of(source(PHOTOS), count, seed)
    return read_all(preset.feed, train)[0], read_all(preset.feed, unseen_of(count, seed, part))[0], train


def unseen_of(count: int, seed: int, part: str = "test") -> Source:
    """The photographs that nobody trains on; part "dev": 800 training photographs that `photos` leaves out, for choosing sizes."""
    return Subset(rest_of(source(PHOTOS), count, seed), range(800), "dev") if part == "dev" else source(PHOTOS, split="test")


def mirrored(image: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Endless random batches, half of the pictures mirrored: enough of an augmentation where masks are drawn anew every time."""
    lot = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(image), generator=lot)[:len(image) // size * size].split(size):
            turn = (torch.rand(size, 1, 1, 1, generator=lot) < 0.5)
            yield {"image": torch.where(turn, image[rows].flip(-1), image[rows])}


def learned(id: str, preset: Preset, image: Tensor, steps: int, seed: int, prepare: Callable[[System], None] | None = None, batch_size: int = 64,
            **more: Any) -> Arm:
    """A masked model trained on pictures in memory for so many steps."""
    plan = preset.but(**{"stages.0.steps": steps, "stages.0.batch_size": batch_size, "stages.0.optim.warmup": max(1, steps // 10), **more})
    return train_arm(id, plan, None, needs=("image",), seed=seed, prepare=prepare, batches=mirrored(image, batch_size, seed))  # type: ignore[arg-type]


def smaller(preset: Preset) -> Preset:
    """With an encoder of three blocks of 64 numbers."""
    return preset.but(**{"config.encoder.body.width": 64, "config.encoder.body.depth": 3, "config.encoder.body.heads": 2})


def small_clip(seed: int, steps: int = 120, told: Source | None = None) -> Pipeline:
    """Photographs of 32 px in patches of 4, so that its grid is the student's. told: what it learns from, natural_captions."""
    plan = plain_clip(steps)
    plan = plan.but(config=plan.config.but(**pair(patch=4, width=48, depth=2)), **{"stages.0.batch_size": 64})
    return train_arm("clip", plan, told or source("natural_captions"), needs=("image", "text"), seed=seed).subject


def taught_by(preset: Preset, clip: Pipeline) -> Preset:
    """A preset whose target is CLIP's features, of the small one."""
    of: Any = clip.preset.config
    feed, plan = preset.feed.image, clip.preset.feed.image
    assert feed is not None and plan is not None
    return preset.but(**{"config.target.tower": of.vision, "config.target.head": of.image_head, "config.target.width": of.image_head.out,
                         "config.target.size": plan.size, "config.target.mean": feed.mean, "config.target.std": feed.std,
                         "config.target.tower_mean": plan.mean, "config.target.tower_std": plan.std})


def lending(preset: Preset, clip: Pipeline) -> Callable[[System], None]:
    """What puts the small CLIP's weights into the target."""
    def stand(system: System) -> None:
        for start in preset.starts:
            carry(start, clip, system)  # type: ignore[arg-type]
    return stand


def nearest(values: Tensor, mask: Tensor) -> Tensor:
    """values [B,N,...], mask [B,N] of a square grid -> [B,N,...]: at every place what stands at the nearest visible one (of several the first)."""
    side = round(mask.shape[1] ** 0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    far = torch.cdist(place, place)[None].expand(len(mask), -1, -1).masked_fill(mask[:, None], torch.inf)
    return torch.stack([v[n] for v, n in zip(values, far.argmin(-1), strict=True)])


def visible_mean(values: Tensor, mask: Tensor) -> Tensor:
    """values [B,N,D] -> the same shape: everywhere the mean of the visible places."""
    seen = (~mask)[..., None].to(values.dtype)
    return ((values * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)).expand_as(values)


@torch.inference_mode()
def guessed(arm: Arm, image: Tensor, average: Tensor, alike: Callable[[Tensor, Tensor], float], seed: int) -> dict[str, float]:
    """How alike guesses and truth are at hidden patches of image [n,3,H,W]: what the arm says (under its name), the `average` [D] of training
    pictures, and what stands at the nearest visible patch. alike: of two [M,D] -> their mean likeness."""
    system, sums = arm.subject.system, dict[str, float]()
    torch.manual_seed(seed)
    for some in image.split(100):
        masking = system.masking(some)
        said, truth = system.pairs(some, masking)
        for name, guess in ((arm.subject.id, said), ("the average", average.expand_as(truth)),
                            ("the nearest visible patch", nearest(system.target.whole(some), masking.mask)[masking.mask])):
            sums[name] = sums.get(name, 0.0) + alike(guess, truth) * len(some) / len(image)
    return sums


def cube_guesses(cubes: Tensor, masking: Masking, grid: tuple[int, int, int], haste: float = 1.0) -> dict[str, Tensor]:
    """Every hidden cube [B,N,.] of a grid (t, h, w) in the mean colour of the visible ones, and as the nearest visible one, in units of cubes; a
    step in time counts `haste`: near 0, the same place at another time comes first."""
    seen, (_, h, w) = masking.at_visible(cubes), grid
    colour = seen.unflatten(-1, (-1, 3)).mean((1, 2))[:, None].repeat(1, masking.hidden.shape[1], cubes.shape[-1] // 3)
    place = torch.stack([masking.order // (h * w) * haste, masking.order // w % h, masking.order % w], -1).float()
    near = torch.cdist(place[:, masking.visible:], place[:, :masking.visible]).argmin(2)
    return {"mean of the visible cubes": colour, "nearest visible cube": take(cubes, masking.keep.gather(1, near))}


def probed(subject: Any, train: Source, count: int = 1000) -> float:
    """Accuracy of a linear layer on frozen features, learned from `count` labelled photographs, on the unseen ones."""
    few = Subset(train, range(min(count, len(train))))
    return exam("linear_probe", subject, source(PHOTOS, split="test"), "accuracy", train=few, sweep=(10.0, 1000.0))
