"""nCLIP's and xCLIP's essence (Zhou et al. 2023); the closed forms of the terms stand in tests/objectives/test_tokenwise.py."""
import math

import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.objectives.clusters import agreement, sharpness, spread_entropy
from polysense.objectives.contrastive import info_nce

recipe = polysense.load("nclip_xclip")
HEADS = ("image_head", "text_head", "log_scale")


@pytest.fixture()
def system():
    torch.manual_seed(0)
    few = recipe.clusters(128, 64, 32)
    return preset_of("nclip_xclip").config.but(image_clusters=few, text_clusters=few).build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("nclip_xclip"), ("image", "text"), n=6)


def gradients(system, batch, weights):
    system.zero_grad()
    system.compare_clusters(system.embed_clusters(batch)).total(weights).backward()
    return {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_the_terms_are_those_of_the_equation(system, batch):
    seen = system.embed_clusters(batch)
    p, q = seen["image_logits"].softmax(-1), seen["text_logits"].softmax(-1)

    def entropy(x):
        return -(x * x.log()).sum(-1)
    losses = system.compare_clusters(seen)
    agree = -((q * p.log()).sum(-1).mean() + (p * q.log()).sum(-1).mean()) / 2
    torch.testing.assert_close(losses["agree"], agree)
    torch.testing.assert_close(losses["sure"], (entropy(p).mean() + entropy(q).mean()) / 2)
    torch.testing.assert_close(losses["used"], -(entropy(p.mean(0)) + entropy(q.mean(0))) / 2)
    torch.testing.assert_close(losses["contrast"], info_nce(seen["image"], seen["text"], system.scale))
    assert dict(preset_of("nclip_xclip").stages[0].weights) == {"contrast": 1.0, "agree": recipe.WEIGHT,
                                                               "sure": recipe.WEIGHT * recipe.SURE, "used": recipe.WEIGHT * recipe.USED}


def test_without_clusters_it_is_clip(system, batch):
    got = gradients(system, batch, recipe.weights_of(0.0))
    system.zero_grad()
    system.compare(system.embed(batch)).total().backward()
    want = {n: p.grad for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert set(got) == set(want) and not any("clusters" in n for n in got)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_clusters_alone_do_not_touch_clips_heads_or_scale(system, batch):
    got = gradients(system, batch, recipe.weights_of(1.0, 0.0))
    assert not any(n.startswith(HEADS) for n in got) and any(n.startswith("vision.") for n in got) and any(n.startswith("text.") for n in got)
    assert {n.split(".")[0] for n in got} == {"vision", "text", "image_clusters", "text_clusters"}


def test_image_and_text_are_exchangeable(system, batch):
    seen = system.embed_clusters(batch)
    other = {"image": seen["text"], "text": seen["image"], "image_logits": seen["text_logits"], "text_logits": seen["image_logits"]}
    a, b = system.compare_clusters(seen), system.compare_clusters(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_zero_shot_uses_clips_heads_and_the_clusters_can_be_thrown_away(system, batch):
    before = system.eval().encode_image(batch["image"])
    torch.testing.assert_close(before, F.normalize(system.image_head(system.vision.pooled(batch["image"])), dim=-1))
    system.image_clusters = system.text_clusters = None
    assert torch.equal(before, system.encode_image(batch["image"]))


def test_nclip_trains_towers_and_cluster_heads_alone():
    for name in ("tiny_nclip", "paper_nclip"):
        stage = preset_of("nclip_xclip", name).stages[0]
        assert dict(stage.weights)["contrast"] == 0 and not any(t.startswith(HEADS) or t == "*" for t in stage.trainable)
    assert preset_of("nclip_xclip", "paper").config.image_clusters.out == 32_768


def nclip(system, batch, steps, used=recipe.USED):
    """The terms after some steps of nCLIP."""
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = system.compare_clusters(system.embed_clusters(batch))
        losses.total((("contrast", 0.0), ("agree", 1.0), ("sure", recipe.SURE), ("used", used))).backward()
        optimizer.step()
    return {name: value.item() for name, value in losses.items()}


def test_equal_doubt_of_all_clusters_is_left(system, batch):
    found = nclip(system, batch, 60)
    assert found["sure"] < 0.7 * math.log(32) and found["used"] < -0.9 * math.log(6)


def test_without_the_last_term_all_fall_into_one_cluster(system, batch):
    found = nclip(system, batch, 60, used=0.0)
    assert found["sure"] < 0.1 and found["used"] > -0.1


def test_a_small_push_grows_into_clusters_and_not_into_one():
    """Near equal likelihood of all clusters: what depends on the sample lowers the loss, what all samples share raises it."""
    own, shared = 1e-2 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), 1e-2 * torch.randn(1, 16).expand(64, -1)

    def total(logits):
        return agreement(logits, logits) + recipe.SURE * sharpness(logits) - recipe.USED * spread_entropy(logits)
    start = total(torch.zeros(64, 16))
    assert total(own) < start < total(shared)
