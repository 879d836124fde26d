"""A small AlexNet reads handwriting, better than a linear classifier of the same pixels. In the notes: what overlapping pools and dropout do to the
errors in training and test.

All see the same pictures in the same order. Rate, width and steps were chosen on the first 2,000 test pictures of a fixed shuffle; the score is
taken on the others.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.system import Preset
from polysense.data import source
from polysense.proofs.arms import drawn, read_all, rest_of, share_right, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import alexnet
from polysense.towers.convnet import Pool

STEPS, SIZE, FEW = 300, 32, 5000
METRIC, HIGHER_IS_BETTER = f"mnist accuracy of a quarter-wide AlexNet at 28 px, {STEPS} steps of {SIZE} on {FEW:,} pictures", True
DATA = f"mnist ({FEW:,} train, 2,000 test)"


def variants() -> dict[str, Preset]:
    base = alexnet.tiny().but(**{"stages.0.steps": STEPS, "stages.0.batch_size": SIZE, "feed.image.mean": (0.13,) * 3, "feed.image.std": (0.31,) * 3})
    apart = {f"config.backbone.rows.{i}.pool": Pool.Config() for i in (0, 1, 4)}
    return {"": base, ", pools that do not overlap": base.but(**apart, **{"config.backbone.grid": 3}),
            ", without dropout": base.but(**{"config.backbone.dropout": 0.0})}


def linear(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> float:
    """A softmax classifier of the pixels, trained as long by Adam."""
    layer = torch.nn.Linear(train[0][0].numel(), 10)
    torch.nn.init.zeros_(layer.weight)
    optimizer, batches = torch.optim.Adam(layer.parameters(), lr=1e-3), drawn(*train, SIZE, seed)
    for _ in range(STEPS):
        batch = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(layer(batch["image"].flatten(1)), batch["label"]).backward()
        optimizer.step()
    with torch.inference_mode():
        return float((layer(test[0].flatten(1)).argmax(1) == test[1]).float().mean())


def run(seed: int, chosen: bool = True) -> Outcome:
    feed, notes = variants()[""].feed, dict[str, float]()
    train = read_all(feed, some_of(source("mnist"), FEW, seed))
    test = read_all(feed, (rest_of if chosen else some_of)(source("mnist", split="test"), 2000, 0))
    for name, plan in variants().items():
        system = train_arm("alexnet", plan, source("mnist"), needs=("image", "label"), seed=seed, batches=drawn(*train, SIZE, seed)).subject.system
        notes |= {f"test accuracy{name}": share_right(system, *test), f"training accuracy{name}": share_right(system, *(t[:2000] for t in train))}
    return Outcome(notes.pop("test accuracy"), {"0.85": 0.85, "linear softmax on pixels": linear(train, test, seed)}, notes)
