"""Every contrastive loss against a slow twin written from its formula with Python loops, its symmetries, and itself over two ranks."""
from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polysense.objectives import tiled
from polysense.objectives.contrastive import info_nce, multi_positive, nt_xent, sigmoid_loss

N, D = 7, 5


def unit(n: int, d: int = D, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def dot(x, y) -> float:
    return sum(float(p) * float(q) for p, q in zip(x, y, strict=True))


def ce(logits: list[float], target: int) -> float:
    return log(sum(exp(v) for v in logits)) - logits[target]


def slow_info_nce(a, b, s) -> float:
    n = len(a)
    rows = sum(ce([s * dot(a[i], b[j]) for j in range(n)], i) for i in range(n))
    columns = sum(ce([s * dot(a[i], b[j]) for i in range(n)], j) for j in range(n))
    return (rows + columns) / (2 * n)


def slow_nt_xent(one, two, t) -> float:
    views = [v / v.norm() for v in [*one, *two]]
    n, total = len(one), 0.0
    for i, v in enumerate(views):
        others = [j for j in range(2 * n) if j != i]
        total += ce([dot(v, views[j]) / t for j in others], others.index((i + n) % (2 * n)))
    return total / (2 * n)


def slow_sigmoid(a, b, s, bias) -> float:
    n = len(a)
    return -sum(log(1 / (1 + exp(-(1 if i == j else -1) * (s * dot(a[i], b[j]) + bias)))) for i in range(n) for j in range(n)) / n


def slow_multi_positive(a, b, s, la, lb) -> float:
    both = []
    for x, y, lx, ly in ((a, b, la, lb), (b, a, lb, la)):
        terms = []
        for i in range(len(x)):
            logits = [s * dot(x[i], y[j]) for j in range(len(y))]
            positives = [j for j in range(len(y)) if ly[j] == lx[i]]
            if positives:
                terms.append(sum(ce(logits, j) for j in positives) / len(positives))
        both.append(sum(terms) / max(1, len(terms)))
    return sum(both) / 2


LABEL, TEXT_LABEL = torch.tensor([4, 4, 9, 2, 2, 2, 0]), torch.tensor([4, 9, 9, 2, 2, 7, 4])
LOSSES = {
    "info_nce": (lambda a, b, s: info_nce(a, b, s), lambda a, b, s: slow_info_nce(a, b, s)),
    "nt_xent": (lambda a, b, s: nt_xent(a, b, 1 / s), lambda a, b, s: slow_nt_xent(a, b, 1 / s)),
    "sigmoid": (lambda a, b, s: sigmoid_loss(a, b, s, s / 10 - 2), lambda a, b, s: slow_sigmoid(a, b, s, s / 10 - 2)),
    "labels": (lambda a, b, s: multi_positive(a, b, s, LABEL), lambda a, b, s: slow_multi_positive(a, b, s, LABEL, LABEL)),
    "two_labels": (lambda a, b, s: multi_positive(a, b, s, LABEL, TEXT_LABEL),
                   lambda a, b, s: slow_multi_positive(a, b, s, LABEL, TEXT_LABEL)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
SCALE = torch.tensor(3.0, dtype=torch.float64)


@pytest.fixture(params=["one tile", "tiles of 3", "tiles of 4"])
def tiling(request, monkeypatch):
    if request.param != "one tile":
        monkeypatch.setattr(tiled, "SMALL", 0)
        monkeypatch.setattr(tiled, "SIDE", {"cpu": int(request.param[-1])})


@every_loss
def test_equals_its_slow_twin(name: str, tiling):
    fast, slow = LOSSES[name]
    assert float(fast(unit(N), unit(N, seed=1), SCALE)) == pytest.approx(slow(unit(N), unit(N, seed=1), float(SCALE)), rel=1e-10)


@every_loss
def test_gradients_of_features_and_scale(name: str, tiling):
    inputs = [unit(N).requires_grad_(), unit(N, seed=1).requires_grad_(), SCALE.clone().requires_grad_()]
    assert torch.autograd.gradcheck(LOSSES[name][0], inputs)


@every_loss
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_each_gradient_alone_is_the_same(name: str, wanted: tuple[int, ...], tiling):
    """A locked tower asks for fewer gradients; those that remain do not change."""
    def gradients(which):
        inputs = [unit(N), unit(N, seed=1), SCALE.clone()]
        for i in which:
            inputs[i].requires_grad_()
        LOSSES[name][0](*inputs).backward()
        return {i: inputs[i].grad for i in which}

    every = gradients((0, 1, 2))
    for i, g in gradients(wanted).items():
        torch.testing.assert_close(g, every[i], rtol=1e-9, atol=1e-12)


@every_loss
def test_differentiating_twice_is_refused(name: str):
    a = unit(N).requires_grad_()
    loss = LOSSES[name][0](a, unit(N, seed=1), SCALE)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(loss, a, create_graph=True)


@pytest.mark.parametrize("name", [n for n in LOSSES if "labels" not in n])       # labels are permuted in a test of their own
def test_joint_permutation_changes_nothing(name: str, tiling):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    a, b, loss = unit(N), unit(N, seed=1), LOSSES[name][0]
    assert float(loss(a[order], b[order], SCALE)) == pytest.approx(float(loss(a, b, SCALE)), rel=1e-12)
    assert float(loss(a, b[order], SCALE)) != pytest.approx(float(loss(a, b, SCALE)), rel=1e-3)      # the pairing matters


@every_loss
def test_swapping_the_towers_changes_nothing(name: str):
    a, b, loss = unit(N), unit(N, seed=1), LOSSES[name][0]
    swapped = multi_positive(b, a, SCALE, TEXT_LABEL, LABEL) if name == "two_labels" else loss(b, a, SCALE)
    assert float(swapped) == pytest.approx(float(loss(a, b, SCALE)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 11), d=st.integers(1, 6), side=st.integers(1, 6), seed=st.integers(0, 99), scale=st.floats(0.1, 20))
def test_tiles_of_any_size_on_any_shape(n: int, d: int, side: int, seed: int, scale: float):
    a, b = unit(n, d, seed), unit(n, d, seed + 100)
    label = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    losses = [lambda: info_nce(a, b, scale), lambda: nt_xent(a, b, 1 / scale), lambda: sigmoid_loss(a, b, scale, -1.0),
              lambda: multi_positive(a, b, scale, label)]
    with pytest.MonkeyPatch.context() as patch:
        whole = [float(loss()) for loss in losses]
        patch.setattr(tiled, "SMALL", 0)
        patch.setattr(tiled, "SIDE", {"cpu": side})
        assert [float(loss()) for loss in losses] == pytest.approx(whole, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_equal_embeddings_cost_ln_n(n: int):
    same = unit(1).expand(n, D)
    assert float(info_nce(same, same, 14.3)) == pytest.approx(log(n), abs=1e-9)
    assert float(multi_positive(same, same, 14.3, torch.zeros(n, dtype=torch.long))) == pytest.approx(log(n), abs=1e-9)


@pytest.mark.parametrize("t", [0.1, 0.5])
def test_nt_xent_of_orthogonal_samples_in_identical_views(t: float):
    z = torch.eye(6, dtype=torch.float64)[:4]
    assert float(nt_xent(z, z, t)) == pytest.approx(log(1 + (2 * 4 - 2) * exp(-1 / t)), rel=1e-9)
    assert float(nt_xent(3 * z, z / 7, t)) == pytest.approx(float(nt_xent(z, z, t)), rel=1e-12)      # cosine: length is nothing


def test_labels_all_different_give_info_nce():
    a, b = unit(N), unit(N, seed=1)
    assert float(multi_positive(a, b, SCALE, torch.randperm(N))) == pytest.approx(float(info_nce(a, b, SCALE)), rel=1e-12)


def test_labels_permute_with_their_samples():
    order = torch.randperm(N)
    a, b = unit(N), unit(N, seed=1)
    assert float(multi_positive(a[order], b[order], SCALE, LABEL[order])) == pytest.approx(float(multi_positive(a, b, SCALE, LABEL)), rel=1e-12)


def test_sigmoid_pairs_are_independent_questions():
    """With one pair it is the plain logistic loss; twice the batch of strangers adds only their cross terms."""
    a, b = unit(1), unit(1, seed=1)
    assert float(sigmoid_loss(a, b, 10.0, -3.0)) == pytest.approx(float(F.softplus(-(10 * (a * b).sum() - 3))), rel=1e-9)


def test_a_perfect_batch_never_costs_less_than_nothing():
    z = F.normalize(torch.randn(300, 64), dim=-1)
    assert 0 <= float(info_nce(z, z, 100.0)) < 1e-4


def test_extreme_logits_stay_finite():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    b = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]).requires_grad_()
    for loss in (info_nce(a, b, 500.0), nt_xent(a, b, 1 / 500), sigmoid_loss(a, b, 500.0, 0.0)):
        loss.backward()
        assert loss.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()


@every_loss
def test_half_precision_features_are_raised_and_autocast_is_ignored(name: str, tiling):
    a, b, loss = unit(N).bfloat16(), unit(N, seed=1).bfloat16(), LOSSES[name][0]
    exact = float(loss(a.double(), b.double(), 60.0))
    if name == "nt_xent":                                    # F.normalize rounds to bfloat16 once more
        a, b = a.float(), b.float()
    assert loss(a, b, 60.0).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert float(loss(a, b, 60.0)) == pytest.approx(exact, rel=1e-5)
        a.requires_grad_()
        loss(a, b, 60.0).backward()
        assert a.grad.dtype == a.dtype


def test_gradients_equal_the_dense_loss():
    """The promise of the benchmark, at a size with several tiles, in float32."""
    a, b = (unit(1200, 64, s, torch.float32).requires_grad_() for s in (0, 1))
    s = torch.tensor(14.3, requires_grad=True)
    logits, target = s * a @ b.T, torch.arange(1200)
    dense = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "SMALL", 0)
        ours = info_nce(a, b, s)
        for x, y in zip(torch.autograd.grad(ours, (a, b, s)), torch.autograd.grad(dense, (a, b, s)), strict=True):
            assert float((x - y).norm() / y.norm()) < 1e-5
    assert ours.item() == pytest.approx(dense.item(), rel=1e-6)


def test_no_tensor_of_all_pairs_is_ever_made():
    """Nothing as large as a quarter of the matrix of logits is allocated, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    n = 3000
    a, b = (unit(n, 8, s, torch.float32).requires_grad_() for s in (0, 1))
    with Watch():
        (info_nce(a, b, 10.0) + sigmoid_loss(a, b, 10.0, -1.0) + multi_positive(a, b, 10.0, torch.arange(n) // 2)).backward()
        nt_xent(a, b, 0.1).backward()
    assert 0 < largest <= n * n * 4 / 4


@pytest.mark.parametrize("a, b", [((3, 4), (4, 4)), ((3, 4), (3, 5)), ((3,), (3,)), ((0, 4), (0, 4))])
def test_wrong_shapes_are_refused(a, b):
    with pytest.raises(ValueError, match="should be"):
        info_nce(torch.zeros(a), torch.zeros(b), 1.0)


def test_labels_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="labels should be"):
        multi_positive(unit(3), unit(3), 1.0, torch.zeros(4, dtype=torch.long))
