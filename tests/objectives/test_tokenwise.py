"""FILIP's late interaction and the cluster losses against slow twins, their memory and their selection of tokens."""
from math import ceil, log

import pytest
import torch
import torch.nn.functional as F

from polysense.objectives import tokenwise
from polysense.objectives.clusters import agreement, sharpness, spread_entropy
from polysense.objectives.contrastive import info_nce, nearest, one_way_nce
from polysense.objectives.tokenwise import best_tokens, token_nce, token_similarity
from polysense.objectives.twin import queue_nce

B, K, L, D = 5, 4, 3, 6
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()


def tokens(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def slow(patches, words, mask, scale):
    """Every similarity by itself, from the definition."""
    see, say = torch.zeros(len(patches), len(words), dtype=patches.dtype), torch.zeros(len(words), len(patches), dtype=patches.dtype)
    for i, v in enumerate(patches):
        for j, t in enumerate(words):
            real = t[mask[j]]
            dots = v @ real.T
            see[i, j], say[j, i] = dots.max(1).values.mean(), dots.max(0).values.mean()
    target = torch.arange(len(patches))
    return (F.cross_entropy(scale * see, target) + F.cross_entropy(scale * say, target)) / 2, see, say


@pytest.fixture(params=["one tile", "tiles of two", "tiles of one"])
def tiling(request, monkeypatch):
    size = {"tiles of two": 4 * K * L, "tiles of one": 1}.get(request.param)
    if size:
        monkeypatch.setattr(tokenwise, "TILE", size)


def test_equals_the_dense_form_in_value_and_gradient(tiling):
    patches, words = tokens(B, K, D).requires_grad_(), tokens(B, L, D, seed=1).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    ours, (want, see, say) = token_nce(patches, words, MASK, scale), slow(patches, words, MASK, scale)
    torch.testing.assert_close(ours, want)
    for x, y in zip(torch.autograd.grad(ours, (patches, words, scale)), torch.autograd.grad(want, (patches, words, scale)), strict=True):
        torch.testing.assert_close(x, y)
    every = torch.ones(B, K, dtype=torch.bool)
    torch.testing.assert_close(token_similarity(patches.detach(), every, words.detach(), MASK), see.detach())
    torch.testing.assert_close(token_similarity(words.detach(), MASK, patches.detach(), every), say.detach())
    assert not torch.allclose(see, say.T, atol=1e-2), "the two similarities differ"


def test_one_token_a_side_is_clip():
    a, b = tokens(B, 1, D), tokens(B, 1, D, seed=1)
    torch.testing.assert_close(token_nce(a, b, torch.ones(B, 1, dtype=torch.bool), 9.0), info_nce(a[:, 0], b[:, 0], 9.0))


def test_padding_and_the_order_of_patches_change_nothing():
    patches, words = tokens(B, K, D), tokens(B, L, D, seed=1)
    want = token_nce(patches, words, MASK, 7.0)
    longer, mask = torch.cat([words, tokens(B, 2, D, seed=5)], 1), torch.cat([MASK, torch.zeros(B, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(token_nce(patches, longer, mask, 7.0), want)
    torch.testing.assert_close(token_nce(patches[:, torch.randperm(K)], words, MASK, 7.0), want)
    changed = torch.where(MASK[..., None], words, tokens(B, L, D, seed=8))
    torch.testing.assert_close(token_nce(patches, changed, MASK, 7.0), want, msg="what stands on padding is never looked at")


def test_selection_keeps_a_quarter_of_each_sample_and_never_padding():
    words, patches = tokens(6, 11, D, dtype=torch.float32), tokens(6, 9, D, seed=1, dtype=torch.float32)
    mask = torch.arange(11) < torch.tensor([11, 8, 5, 4, 1, 9])[:, None]
    marked = torch.where(mask[..., None], words, 9.0)                                # padding would win every maximum
    chosen, kept = best_tokens(marked, mask, patches, torch.ones(6, 9, dtype=torch.bool), 0.25)
    assert kept.sum(1).tolist() == [ceil(0.25 * n) for n in (11, 8, 5, 4, 1, 9)] and chosen.shape[1] == 3
    assert (chosen[kept].norm(dim=-1) < 1.01).all()
    best = (words @ patches.flatten(0, 1).T).amax(-1).masked_fill(~mask, -9)
    for i in range(6):
        want = words[i, best[i].topk(int(kept[i].sum())).indices]
        torch.testing.assert_close(chosen[i, kept[i]], want)
    everything, same = best_tokens(words, mask, patches, torch.ones(6, 9, dtype=torch.bool), 1.0)
    assert everything is words and same is mask


def test_selected_tokens_change_only_what_a_sample_shows_to_others():
    patches, words = tokens(B, K, D), tokens(B, L, D, seed=1)
    shown, shown_mask = best_tokens(patches, torch.ones(B, K, dtype=torch.bool), words, MASK, 0.5)
    said, said_mask = best_tokens(words, MASK, patches, torch.ones(B, K, dtype=torch.bool), 0.5)
    see = token_similarity(patches, torch.ones(B, K, dtype=torch.bool), said, said_mask)
    say = token_similarity(words, MASK, shown, shown_mask)
    want = (F.cross_entropy(7 * see, torch.arange(B)) + F.cross_entropy(7 * say, torch.arange(B))) / 2
    torch.testing.assert_close(token_nce(patches, words, MASK, 7.0, keep=0.5), want)


def test_the_array_of_all_token_pairs_never_exists(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    monkeypatch.setattr(tokenwise, "TILE", 20_000)
    n = 64
    patches, words = tokens(n, 12, 8, dtype=torch.float32).requires_grad_(), tokens(n, 10, 8, seed=1, dtype=torch.float32).requires_grad_()
    with Watch():
        token_nce(patches, words, torch.ones(n, 10, dtype=torch.bool), 7.0).backward()
    assert largest <= 20_000 < n * n * 12 * 10 / 20


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="should be"):
        token_nce(tokens(B, K, D), tokens(B, L, D), MASK[:, :2], 1.0)


# One-way losses: queue and nearest neighbours

def test_one_way_is_the_rows_of_clip_and_takes_a_queue():
    query, key, queue = tokens(B, D), tokens(B, D, seed=1), tokens(9, D, seed=2)
    logits = 5 * query @ torch.cat([key, queue]).T
    torch.testing.assert_close(one_way_nce(query, key, 5.0, queue), F.cross_entropy(logits, torch.arange(B)))
    torch.testing.assert_close((one_way_nce(query, key, 5.0) + one_way_nce(key, query, 5.0)) / 2, info_nce(query, key, 5.0))
    one = (query[:1], key[:1])
    torch.testing.assert_close(one_way_nce(*one, 5.0, queue).float(), queue_nce(*one, queue, 0.2), rtol=1e-5, atol=1e-6)


def test_nearest_is_the_argmax_in_blocks_without_a_graph():
    query, keys = tokens(7, D).requires_grad_(), tokens(20, D, seed=1)
    got = nearest(query, keys, block=3)
    assert torch.equal(got, keys[(query @ keys.T).argmax(1)]) and not got.requires_grad


# Clusters

def test_cluster_losses_have_their_closed_forms():
    sure = 200.0 * torch.eye(4).double()
    assert agreement(sure, sure).item() == pytest.approx(0, abs=1e-6) and sharpness(sure).item() == pytest.approx(0, abs=1e-6)
    assert spread_entropy(sure).item() == pytest.approx(log(4), abs=1e-5)
    assert spread_entropy(200.0 * torch.eye(8)[:3]).item() == pytest.approx(log(3), abs=1e-4), "ln of the smaller of clusters and samples"
    constant = 200.0 * F.one_hot(torch.zeros(4, dtype=torch.long), 4).double()
    assert agreement(constant, constant).item() == pytest.approx(0, abs=1e-6) and spread_entropy(constant).item() == pytest.approx(0, abs=1e-5)

    def total(x):
        return agreement(x, x) + sharpness(x) - spread_entropy(x)
    assert total(constant) > total(sure) + 1, "saying the same of everything costs more"


def test_agreement_is_symmetric_and_the_mean_of_two_cross_entropies():
    one, two = torch.randn(6, 5), torch.randn(6, 5)
    want = (F.cross_entropy(one, two.softmax(-1)) + F.cross_entropy(two, one.softmax(-1))) / 2
    torch.testing.assert_close(agreement(one, two), want)
    torch.testing.assert_close(agreement(two, one), want)
