"""Parameter groups, layer-wise decay and the optimisers of our own, against naive twins."""
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn
from train.toys import toy

from polysense.base.errors import UserError
from polysense.base.plan import Optim
from polysense.train.adafactor import Adafactor
from polysense.train.optim import LAMB, LARS, groups, layers, make_optimizer

VIT = ["log_scale", "vision.cls", "vision.position", "vision.patch.weight", "vision.norm_pre.weight", "vision.body.blocks.0.attn.q.weight",
       "vision.body.blocks.1.attn.q.weight", "vision.body.blocks.10.mlp.up.weight", "vision.body.norm.weight", "text.embed.weight",
       "text.body.blocks.0.norm1.weight", "text.body.norm.bias", "image_head.weight"]
RESNET = ["backbone.stem.conv.weight", "backbone.stages.0.0.conv1.weight", "backbone.stages.0.1.conv1.weight", "backbone.stages.3.0.norm1.weight",
          "backbone.pool.q.weight", "head.weight"]


def test_layers_are_read_from_the_names():
    got = layers(VIT)
    assert [got[n] for n in VIT] == [(0, 0), (0, 12), (0, 12), (0, 12), (0, 12), (1, 12), (2, 12), (11, 12), (12, 12), (0, 2), (1, 2), (2, 2), (0, 0)]
    got = layers(RESNET)
    assert [got[n] for n in RESNET] == [(0, 5), (1, 5), (1, 5), (4, 5), (5, 5), (0, 0)]
    assert layers(["patch.weight", "blocks.0.w", "blocks.1.w", "norm.weight", "head.weight"])["patch.weight"] == (0, 3)


def test_layer_decay_rises_strictly_and_takes_each_parameter_once():
    system = toy()
    parts = groups(system, Optim(lr=1.0, weight_decay=0.1, layer_decay=0.5))
    names = [n for g in parts for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in system.named_parameters())
    assert sum(len(g["params"]) for g in parts) == len({id(p) for g in parts for p in g["params"]}) == len(names)
    scale = {n: g["scale"] for g in parts for n in g["names"]}
    rising = [scale[n] for n in ("vision.patch.weight", *(f"vision.blocks.{i}.up.weight" for i in range(3)), "vision.norm.weight")]
    assert rising == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1] and scale["log_scale"] == 1 == scale["words.weight"]
    assert all(b > a for a, b in pairwise(rising))


def test_decay_spares_biases_norms_and_scalars():
    for group in groups(toy(), Optim(lr=1.0, weight_decay=0.1)):
        for name, p in zip(group["names"], group["params"]):
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0), name
    conv = nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2))
    assert {n: g["weight_decay"] for g in groups(conv, Optim(lr=1.0, weight_decay=0.1)) for n in g["names"]} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}


def test_lr_scale_multiplies_and_refuses_a_pattern_without_a_match():
    scale = {n: g["scale"] for g in groups(toy(), Optim(lr=1.0, lr_scale=(("vision.*", 0.1), ("*.patch.*", 2.0)))) for n in g["names"]}
    assert scale["vision.patch.weight"] == pytest.approx(0.2) and scale["text.patch.weight"] == 2 and scale["log_scale"] == 1
    with pytest.raises(UserError, match="matches no parameter"):
        groups(toy(), Optim(lr=1.0, lr_scale=(("visoin.*", 0.1),)))
    with pytest.raises(UserError, match="no optimiser 'adamm'"):
        make_optimizer(toy(), Optim(lr=1.0, name="adamm"))


def naive_lars(w, g, state, lr, momentum, decay, adapt):
    g = g + decay * w
    ratio = 1e-3 * w.norm() / g.norm() if adapt and w.norm() > 0 and g.norm() > 0 else 1.0
    state["v"] = momentum * state.get("v", 0) + ratio * g
    return w - lr * state["v"]


def naive_lamb(w, g, state, lr, one, two, eps, decay, adapt):
    state["t"] = state.get("t", 0) + 1
    state["m"] = one * state.get("m", 0) + (1 - one) * g
    state["v"] = two * state.get("v", 0) + (1 - two) * g * g
    r = (state["m"] / (1 - one ** state["t"])) / ((state["v"] / (1 - two ** state["t"])).sqrt() + eps) + decay * w
    ratio = w.norm() / r.norm() if adapt and w.norm() > 0 and r.norm() > 0 else 1.0
    return w - lr * ratio * r


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_our_optimisers_equal_their_naive_twins(kind):
    shapes, twins, states = [(3, 4), (4,), (5, 2), (2, 2)], [], [{} for _ in range(4)]
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    with torch.no_grad():
        params[3].zero_()                                                    # |w| = 0: the trust ratio is 1
    twins = [p.detach().clone() for p in params]
    parts = [{"params": [params[0], params[2], params[3]], "weight_decay": 0.1, "adapt": True},
             {"params": [params[1]], "weight_decay": 0.0, "adapt": False}]
    optimizer = LARS(parts, lr=0.3, momentum=0.8) if kind == "lars" else LAMB(parts, lr=0.3, betas=(0.8, 0.9), eps=1e-4)
    for _ in range(4):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            how = {"decay": 0.1 if p.ndim > 1 else 0.0, "adapt": p.ndim > 1}
            twins[i] = naive_lars(twins[i], p.grad, states[i], 0.3, 0.8, **how) if kind == "lars" else \
                naive_lamb(twins[i], p.grad, states[i], 0.3, 0.8, 0.9, 1e-4, **how)
        optimizer.step()
        for p, twin in zip(params, twins):
            torch.testing.assert_close(p.detach(), twin)


def naive_adafactor(w, g, state, lr, one, cap, decay, least):
    """The published rule entry by entry, first moments apart from their rounding."""
    t = state["t"] = state.get("t", 0) + 1
    keep = min(cap, 1 - t ** -0.8)
    squared = g * g + 1e-30
    if w.ndim == 2 and min(w.shape) >= least:
        state["r"] = keep * state.get("r", 0) + (1 - keep) * squared.mean(1)
        state["c"] = keep * state.get("c", 0) + (1 - keep) * squared.mean(0)
        second = torch.outer(state["r"], state["c"]) / state["r"].mean()
    else:
        second = state["v"] = keep * state.get("v", 0) + (1 - keep) * squared
    state["m"] = (one * state.get("m", torch.zeros_like(g)).float() + (1 - one) * g / second.sqrt()).bfloat16()
    return w - lr * (state["m"].float() + decay * w)


def test_adafactor_keeps_rows_and_columns_of_what_is_large():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s)) for s in ((6, 9), (9, 6), (6, 3), (7,), ())]
    twins, states = [p.detach().clone() for p in params], [{} for _ in params]
    optimizer = Adafactor([{"params": params, "weight_decay": 0.1}], lr=0.02, betas=(0.8, 0.5), least=5)
    for _ in range(6):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            twins[i] = naive_adafactor(twins[i], p.grad, states[i], 0.02, 0.8, 0.5, 0.1, 5)
        optimizer.step()
        for p, twin in zip(params, twins):
            torch.testing.assert_close(p.detach(), twin, rtol=1e-3, atol=1e-4)       # a number may round to its neighbour in bfloat16
    assert [sorted(optimizer.state[p]) for p in params] == [["columns", "exp_avg", "rows", "step"]] * 2 + [["exp_avg", "exp_avg_sq", "step"]] * 3
    twin = Adafactor([{"params": [nn.Parameter(p.detach().clone()) for p in params], "weight_decay": 0.1}], lr=0.02, betas=(0.8, 0.5), least=5)
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        p.grad, q.grad = (g := torch.randn_like(p)), g.clone()
    optimizer.step(), twin.step()
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["exp_avg"], twin.state[q]["exp_avg"]), "it goes on as it was kept"
    kernel = nn.Parameter(torch.randn(3, 40, 2, 50))                                 # the two longest axes, wherever they are
    kernel.grad = torch.randn_like(kernel)
    large = Adafactor([kernel], lr=0.1)
    large.step()
    assert large.state[kernel]["rows"].shape == (3, 40, 2, 1) and large.state[kernel]["columns"].shape == (3, 1, 2, 50)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lars", "lamb", "adafactor"])
def test_every_optimiser_goes_down(name):
    layer = nn.Linear(4, 1)
    optimizer = make_optimizer(layer, Optim(lr=0.3 if name == "lars" else 0.05, name=name))
    x, seen = torch.randn(64, 4), []
    for _ in range(60):
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.9 * seen[0]
