"""Two processes (gloo) against one: mean of the losses, sum-over-ranks gradients, equal and unequal shares of the batch."""
import faulthandler
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from polysense.objectives.clusters import agreement, sharpness, spread_entropy
from polysense.objectives.contrastive import apart, info_nce, multi_positive, nearest, nt_xent, one_way_nce, sigmoid_loss
from polysense.objectives.sampled import margin_softmax, sample_classes
from polysense.objectives.sparse import flops
from polysense.objectives.spread import gather, places, spread, world
from polysense.objectives.tokenwise import token_nce
from polysense.objectives.triplet import POLICIES, hinge

N, D, RANKS = 9, 6, 2
LABEL, TEXT_LABEL = torch.tensor([0, 0, 1, 2, 2, 3, 0, 1, 5]), torch.tensor([0, 1, 1, 2, 0, 3, 0, 1, 6])
WEB = torch.tensor([0, -1, -1, 2, 0, -1, 0, 1, -1])          # -1: of no class, on both ranks
OWNER = torch.tensor([0, 0, 1, 2, 3, 4, 1, 5, 0])            # captions of one picture lie on both ranks
ENTITY = torch.tensor([7, -1, 3, 3, 12, -1, 0, 7, 5])        # as do samples of one entity; some have none
ROWS = torch.randn(14, D, generator=torch.Generator().manual_seed(8))
TILT = torch.linspace(1, 2, D)                               # to a power that is learned: the classes' rows get a gradient too
QUEUE = F.normalize(torch.randn(5, D, generator=torch.Generator().manual_seed(9)), dim=-1)


def words(a, b, part: slice):
    """Rows as three tokens of width two; the second rank's texts are shorter than the first's."""
    mask = torch.arange(3) < 1 + torch.arange(N)[part, None] % 3
    longest = int(mask.sum(1).max())
    one, two = (F.normalize(x.view(-1, 3, 2), dim=-1) for x in (a, b))
    return one, (two * mask[..., None])[:, :longest], mask[:, :longest]


def some(label):
    """Classes as one step draws them: all ranks the same here, so that they can be compared with one process."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return sample_classes(label, len(ROWS), 9)


LOSSES = {
    "info_nce": lambda a, b, s, part: info_nce(a, b, s),
    "nt_xent": lambda a, b, s, part: nt_xent(a, b, 1 / s),
    "sigmoid": lambda a, b, s, part: sigmoid_loss(a, b, s, -s / 3),
    "multi_positive": lambda a, b, s, part: multi_positive(a, b, s, LABEL[part], TEXT_LABEL[part]),
    "queue": lambda a, b, s, part: one_way_nce(a, b, s, QUEUE),
    "neighbours": lambda a, b, s, part: one_way_nce(a, nearest(b, QUEUE), s),
    "tokens": lambda a, b, s, part: token_nce(*words(a, b, part), s),
    "clusters": lambda a, b, s, part: agreement(s * a, b) + 0.5 * (sharpness(s * a) - spread_entropy(s * b)),
    **{f"hinge, {p}": lambda a, b, s, part, p=p: s * hinge(a, b, 0.3, p, OWNER[part]) for p in POLICIES if p != "random"},
    "flops": lambda a, b, s, part: s * flops(F.relu(a)) + flops(F.relu(b)),
    "margin_softmax": lambda a, b, s, part: margin_softmax(a, ROWS * TILT ** s, ENTITY[part], some(ENTITY[part]), 16.0, 0.2),
    "margin_softmax, all": lambda a, b, s, part: margin_softmax(b, ROWS, ENTITY[part], sample_classes(ENTITY[part], len(ROWS), 99), s, 0.0),
    "triplets": lambda a, b, s, part: multi_positive(a, b, s, apart(WEB[part])),
}


def run(part: slice) -> dict[str, tuple]:
    """Loss and gradients of every loss for some rows of the batch; the gradient of a two-layer tower stands for a model's."""
    out = {}
    for name, loss in LOSSES.items():
        g = torch.Generator().manual_seed(0)
        tower, a, b = (torch.randn(shape, generator=g) for shape in ((D, D), (N, D), (N, D)))
        tower, scale = tower.requires_grad_(), torch.tensor(5.0, requires_grad=True)
        one, two = F.normalize(a[part] @ tower, dim=-1), F.normalize(b[part] @ tower.T, dim=-1)
        value = loss(one, two, scale, part)
        value.backward()
        out[name] = (value.detach(), tower.grad, scale.grad)
    return out


def worker(rank: int, folder: str) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    for case, cut in (("equal", 4), ("unequal", 7)):
        n = 2 * cut if case == "equal" else N
        part = slice(0, cut) if rank == 0 else slice(cut, n)
        with spread():
            assert world() == (rank, RANKS)
            torch.save(run(part), Path(folder) / f"{case}{rank}.pt")
            check_gather(rank, part, n)
        assert world() == (0, 1)
    dist.barrier()                                                           # nobody hangs up while the other still talks
    dist.destroy_process_group()
    os._exit(0)                      # all is written: torch's threads sometimes abort a process that unwinds the interpreter under load


def check_gather(rank: int, part: slice, n: int) -> None:
    x = torch.arange(part.start, part.stop).float()[:, None].requires_grad_()
    everyone, at = gather(x), places(x)
    ((rank + 1) * everyone.square()).sum().backward()
    assert everyone.flatten().tolist() == list(range(n)) and at.start == part.start and at.total == n
    torch.testing.assert_close(x.grad, 2 * 3 * x.detach())                   # what both ranks (1 + 2) want of my rows


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=RANKS)
        return {case: [torch.load(Path(folder) / f"{case}{r}.pt") for r in range(RANKS)] for case in ("equal", "unequal")}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case, n", [("equal", 8), ("unequal", N)])
def test_the_mean_over_ranks_is_the_global_loss(name: str, case: str, n: int, two_ranks):
    alone = run(slice(0, n))[name]
    together = [torch.stack(values).mean(0) for values in zip(*(rank[name] for rank in two_ranks[case]), strict=True)]
    for ours, single in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, single, rtol=2e-6, atol=1e-6)


def test_without_processes_spread_changes_nothing():
    a, b = F.normalize(torch.randn(4, 3), dim=-1), F.normalize(torch.randn(4, 3), dim=-1)
    with spread():
        assert world() == (0, 1)
        assert gather(a) is a
        inside = info_nce(a, b, 2.0)
    assert inside == info_nce(a, b, 2.0)
