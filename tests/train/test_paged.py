"""Paged AdamW: the same numbers from mapped memory."""
import copy

import torch
from torch import nn

from polysense.base.system import Optim
from polysense.train.optim import make_optimizer
from polysense.train.paged import PagedAdamW


def steps(optimizer, net, n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        optimizer.zero_grad()
        net(torch.randn(8, 6, generator=g)).square().sum().backward()
        optimizer.step()


def pair():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    return net, copy.deepcopy(net)


def test_the_update_is_adamws_number_for_number():
    one, two = pair()
    steps(PagedAdamW(one.parameters(), lr=0.1, weight_decay=0.1), one)
    steps(torch.optim.AdamW(two.parameters(), lr=0.1, weight_decay=0.1), two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_the_moments_lie_in_one_mapped_file_also_after_a_resume():
    one, two = pair()
    opt = PagedAdamW(one.parameters(), lr=0.1)
    steps(opt, one)
    pages = {s[k].untyped_storage().data_ptr() for s in opt.state.values() for k in ("exp_avg", "exp_avg_sq")}
    assert len(pages) == 1 and next(iter(opt.state.values()))["exp_avg"].untyped_storage().filename is not None
    two.load_state_dict(one.state_dict())
    again = PagedAdamW(two.parameters(), lr=0.1)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert len({s["exp_avg"].untyped_storage().data_ptr() for s in again.state.values()}) == 1
    steps(opt, one, seed=1)
    steps(again, two, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_a_recipe_asks_for_it_by_name():
    net, _ = pair()
    made = make_optimizer(net, Optim(name="paged_adamw", lr=0.1, weight_decay=0.2))
    assert isinstance(made, PagedAdamW) and {g["weight_decay"] for g in made.param_groups} == {0.0, 0.2}
