"""LeNet-5 in both its forms reads handwriting better than a linear classifier, and because it looks locally.

Every network and the linear classifier see the same 10,000 pictures twice, in batches of eight. Then the pixels of all pictures are shuffled
by one fixed permutation, which a linear classifier cannot notice: what the network loses is what neighbourhoods were worth. Rates were chosen
on the first 2,000 test pictures of a fixed shuffle; the scores are taken on the others.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.system import Preset
from polysense.data import source
from polysense.proofs.arms import drawn, read_all, rest_of, share_right, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import lenet5

METRIC, HIGHER_IS_BETTER = "mnist accuracy of the form of 1998 after two passes", True
DATA = "mnist (10,000 train at 28 px, 2,000 test)"
SIZE, EPOCHS = 8, 2


def score(plan: Preset, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> float:
    steps = EPOCHS * len(train[0]) // SIZE
    plan = plan.but(**{"stages.0.steps": steps, "stages.0.batch_size": SIZE})
    arm = train_arm("lenet5", plan, source("mnist"), needs=("image", "label"), seed=seed, batches=drawn(*train, SIZE, seed))
    return share_right(arm.subject.system, *test)


def linear(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int, rate: float = 0.01) -> float:
    """A softmax classifier of the pixels, trained as long by the same optimiser."""
    layer = torch.nn.Linear(train[0][0].numel(), 10)
    torch.nn.init.zeros_(layer.weight)
    optimizer, batches = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9), drawn(*train, SIZE, seed)
    for _ in range(EPOCHS * len(train[0]) // SIZE):
        batch = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(layer(batch["image"].flatten(1)), batch["label"]).backward()
        optimizer.step()
    with torch.inference_mode():
        return float((layer(test[0].flatten(1)).argmax(1) == test[1]).float().mean())


def run(seed: int, chosen: bool = True) -> Outcome:
    feed, test = lenet5.tiny().feed, source("mnist", split="test")
    train = read_all(feed, some_of(source("mnist"), 10_000, seed))
    tested = read_all(feed, (rest_of if chosen else some_of)(test, 2000, 0))
    order, found = torch.randperm(784, generator=torch.Generator().manual_seed(seed)), dict[str, float]()
    shuffled, reshuffled = ((x.flatten(2)[..., order].view_as(x), y) for x, y in (train, tested))
    for name, plan in (("1998", lenet5.tiny()), ("plain", lenet5.plain())):
        found |= {name: score(plan, train, tested, seed), f"{name}, pixels shuffled": score(plan, shuffled, reshuffled, seed)}
    found |= {"linear softmax on pixels": linear(train, tested, seed), "linear, pixels shuffled": linear(shuffled, reshuffled, seed)}
    return Outcome(found.pop("1998"), {"0.8": 0.8, "linear softmax on pixels": found.pop("linear softmax on pixels")}, found)
