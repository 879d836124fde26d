"""The attentive probe and the one exam of all probes: planted features, invariances, the reference's pooling."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import reference, shake
from torch import nn

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data import source
from polysense.nn.attentive import AttentivePool
from polysense.pipeline import Pipeline
from polysense.tasks import take
from polysense.tasks.attentive_probe import places_of
from polysense.tasks.attentive_probe import run as attentive
from polysense.tasks.encode import Features
from polysense.tasks.knn_probe import votes
from polysense.tasks.probes import diagnosis, neighbours
from polysense.tasks.probes import run as probes


def planted(n: int, seed: int, signal: float = 4.0, places: int = 9, width: int = 12) -> Features:
    """Patches of noise, one of which, anywhere, names the class: no mean of them does."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 3
    x = torch.randn(n, places, width, generator=g)
    x[torch.arange(n), torch.randint(places, (n,), generator=g)] += signal * 3 * F.one_hot(label, width).float()
    return Features("planted" + str(seed), ("image", "label"), ("a", "b", "c"), F.normalize(x, dim=-1), label.numpy(), [[] for _ in label])


SUBJECT = SimpleNamespace(system=SimpleNamespace(tower=SimpleNamespace(dense=lambda image: image), encode_image=None), id="planted")


def test_a_query_finds_the_patch_that_tells_and_labels_at_random_stay_at_chance():
    train, test = planted(150, 1), planted(90, 2)
    found = attentive(SUBJECT, test, train, steps=40, lr=2e-2)
    assert found.value > 0.9 and set(found.notes["validation_accuracy"]) == {"0.001", "0.1"}
    shuffled = Features(train.name, train.offers, train.classes, train.features, np.random.default_rng(0).permutation(train.labels), train.captions)
    assert attentive(SUBJECT, test, shuffled, steps=12, decays=(0.1,)).value < 0.5


def test_the_pool_knows_no_order_and_with_uniform_attention_it_is_the_mean():
    torch.manual_seed(0)
    pool, x = AttentivePool.Config(width=12, heads=3).build().eval(), torch.randn(4, 7, 12)
    torch.testing.assert_close(pool(x[:, torch.randperm(7)]), pool(x))
    with torch.no_grad():
        for name in ("norm_q", "norm_k", "norm_v"):
            setattr(pool, name, nn.Identity())
        for linear in (pool.v, pool.out):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        pool.q.weight.zero_()
        pool.q.bias.zero_()
        torch.testing.assert_close(pool(x), x.mean(1))


@torch.no_grad()
def test_pooling_is_timms_with_its_weights():
    reference("timm")
    from timm.layers.attention_pool import AttentionPoolLatent
    theirs = shake(AttentionPoolLatent(24, num_heads=4, mlp_ratio=2.0))
    ours = AttentivePool.Config(width=24, heads=4).build().eval()
    for name in ("norm_q", "norm_k", "norm_v"):
        setattr(ours, name, nn.Identity())
    ours.query.copy_(theirs.latent)
    k, v = (p.chunk(2) for p in (theirs.kv.weight, theirs.kv.bias))
    for linear, weight, bias in ((ours.q, theirs.q.weight, theirs.q.bias), (ours.k, k[0], v[0]), (ours.v, k[1], v[1]),
                                 (ours.out, theirs.proj.weight, theirs.proj.bias)):
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    x = torch.randn(3, 10, 24)
    pooled = ours(x)
    assert float((pooled + theirs.mlp(theirs.norm(pooled)) - theirs(x)).abs().max()) < 1e-4


def test_neighbours_are_faiss_inner_products_and_k_one_on_itself_is_right():
    x = planted(60, 3, signal=0.3)
    flat = Features(x.name, x.offers, x.classes, x.features[:, 0], x.labels, x.captions)
    assert neighbours(flat, flat, 0, (1,))["knn_1"].value == 1.0
    faiss = reference("faiss")
    index = faiss.IndexFlatIP(flat.features.shape[1])
    index.add(flat.features.numpy())
    near, where = index.search(flat.features[:9].numpy(), 5)
    slow = np.zeros((9, 3))
    for i in range(9):
        for s, j in zip(near[i], where[i], strict=True):
            slow[i, flat.labels[j]] += np.exp((s - near[i, 0]) / 0.07)
    np.testing.assert_allclose(votes(flat.features[:9], flat.features, flat.labels, 3, 5, 0.07), slow, rtol=1e-3, atol=1e-5)


def test_votes_know_neither_the_length_of_features_nor_the_order_of_the_bank():
    x = planted(60, 3, signal=0.3)
    near = lambda scale, order: neighbours(
        Features("a", x.offers, x.classes, F.normalize(scale * x.features[:20, 0], dim=-1), x.labels[:20], x.captions[:20]),
        Features("b", x.offers, x.classes, F.normalize(scale * x.features[20:, 0], dim=-1)[order], x.labels[20:][order], x.captions[20:]), 0, (5,))
    plain = near(1.0, np.arange(40))["knn_5"].value
    assert near(7.0, np.arange(40))["knn_5"].value == plain == near(1.0, np.random.default_rng(0).permutation(40))["knn_5"].value


def test_which_tokens_are_read_is_said_and_written_down():
    from polysense.tasks.encode import encode_all_images, reader
    from polysense.towers.shapes import plain_vit

    tower = plain_vit(16, 4, 12, 5, 2).build().eval()
    system = SimpleNamespace(tower=tower)
    image = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        layers = [tower.body.norm(x) for x in tower.features(image)]
        for word, want in (("cls", layers[-1][:, 0]), ("mean", layers[-1][:, 1:].mean(1)), ("cls4", torch.cat([x[:, 0] for x in layers[-4:]], 1)),
                           ("cls+mean", torch.cat([layers[-1][:, 0], layers[-1][:, 1:].mean(1)], 1))):
            torch.testing.assert_close(reader(system, word)(image), want)
    assert reader(system, "pooled") is None and encode_all_images is not None
    with pytest.raises(UserError, match="pooled, cls, mean"):
        reader(system, "first")
    with pytest.raises(UserError, match="take tokens=pooled"):
        reader(SimpleNamespace(encoder=SimpleNamespace(dense=None)), "cls")


def test_the_probe_of_places_finds_what_lies_where_and_chance_where_nothing_does(data):
    from polysense.base.plan import Feed, ImagePlan
    from polysense.tasks.dense_probe import dense, places

    plain = ImagePlan(size=32, mean=(0,) * 3, std=(1,) * 3)
    who = SimpleNamespace(system=nn.Identity(), preset=SimpleNamespace(feed=Feed(image=plain)), device="cpu")
    test, train = data
    truth = places(who, test, lambda image: torch.ones(len(image), 16, 2), 2, 8)[1]
    assert truth.shape == (20, 16) and set(truth.unique().tolist()) <= {0, 1, 2} and (truth < 2).any() and (truth == 2).any()
    masks = [torch.as_tensor(test.load(i, "mask")).float() for i in range(3)]
    for i, mask in enumerate(masks):
        block = mask.view(mask.shape[0], 4, 8, 4, 8).mean((2, 4)).amax(0).flatten()
        assert torch.equal(truth[i] < 2, block >= 0.5)

    blind = lambda image: torch.ones(len(image), 16, 2)
    known = iter([F.one_hot(part, 3).float() + 0.01 for of in (train, test) for part in places(who, of, blind, 2, 8)[1].split(8)])
    assert dense(who, test, train, lambda image: next(known), batch_size=8).value == 1.0, "features that say the class of every place"
    assert dense(who, test, train, blind, batch_size=8).value < 0.8


def test_diagnosis_knows_a_point_from_a_sphere():
    even, point = F.normalize(torch.randn(400, 16), dim=-1), F.normalize(torch.ones(50, 16), dim=-1)
    assert diagnosis(even)["feature_spread"] == pytest.approx(1, abs=0.05) and diagnosis(even)["effective_rank"] > 14
    assert diagnosis(point)["feature_spread"] == pytest.approx(0, abs=1e-4) and diagnosis(point)["nearest_distance"] == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def pipeline():
    preset = preset_of("simclr").but(**{"config.backbone.base": 8, "config.projector.width": 32})
    torch.manual_seed(0)
    return Pipeline(preset.config.build().eval(), preset, id="simclr")


@pytest.fixture(scope="module")
def data():
    from polysense.proofs.pool import kept

    return kept(source("scenes:single?n=20&size=32&shapes=2", split="val")), kept(source("scenes:single?n=24&size=32&shapes=2"))


def test_all_probes_in_one_exam_leave_the_encoder_bit_for_bit(pipeline, data):
    before = {k: v.clone() for k, v in pipeline.system.state_dict().items()}
    result = take("probes", pipeline, *data, shots=(1, 5), steps=5)
    assert next(iter(result.metrics)) == "linear" and result.units is not None
    assert set(result.metrics) == {"linear", "knn_20", "knn_10", "accuracy_1_shot", "accuracy_5_shot", "attentive", "dense", "untrained_linear",
                                   "untrained_knn_20"}
    assert result.notes["tokens"] == "pooled"
    assert {"C", "attentive weight_decay", "feature_spread", "effective_rank", "nearest_distance"} <= result.notes.keys()
    assert all(torch.equal(v, before[k]) for k, v in pipeline.system.state_dict().items())
    straight, voted = take("linear_probe", pipeline, *data), take("knn_probe", pipeline, *data)
    assert result.metrics["linear"] == straight.metrics["accuracy"] and result.metrics["knn_20"] == voted.metrics["accuracy"]


def test_what_a_system_cannot_do_is_said(pipeline, data):
    blind = SimpleNamespace(system=SimpleNamespace(encode_image=pipeline.system.encode_image), id="blind")
    with pytest.raises(UserError, match="no image tower whose places"):
        places_of(blind.system)
    from polysense.tasks.encode import encode_all_images
    pooled = [encode_all_images(pipeline, d) for d in data]
    with pytest.raises(UserError, match="reads patches"):
        take("attentive_probe", pipeline, *pooled)
    told = probes(pipeline, *pooled, shots=(1,))
    assert "attentive" not in told.metrics and "untrained_linear" not in told.metrics
