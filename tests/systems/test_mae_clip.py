"""MAE-CLIP's essence (Weers et al. 2023): each test fails if its mechanism is replaced by a shortcut."""
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of

recipe = polysense.load("mae_clip")
CONFIG = recipe.config(32, 8, (32, 2, 2), (32, 2, 2), (16, 1, 2), 16, 100, 12, 4, (0, 1, 2))


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return CONFIG.build()


@pytest.fixture(scope="module")
def batch():
    made = fake_batch(preset_of("mae_clip"), ("text",), n=6)
    return made | {"image": torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def gradients(system, batch, weights):
    system.zero_grad()
    torch.manual_seed(5)
    system.compare_masked(system.embed_masked(batch)).total(weights).backward()
    return {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_without_reconstruction_it_is_clip_bit_for_bit(system, batch):
    got = gradients(system, batch, recipe.weights_of(0.0, 0.0))
    system.zero_grad()
    system.compare(system.embed(batch)).total().backward()
    want = {n: p.grad for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert set(got) == set(want) and all(torch.equal(got[n], v) for n, v in want.items())


def test_without_contrast_the_projections_and_the_scale_get_nothing(system, batch):
    got = gradients(system, batch, recipe.weights_of(1.0, 1.0, 0.0))
    assert {n.split(".")[0] for n in got} == {"vision", "text", "decoder", "predict"}
    pixels = gradients(system, batch, recipe.weights_of(1.0, 0.0, 0.0))
    assert {n.split(".")[0] for n in pixels} == {"vision", "decoder"}, "drawing sees no text"
    words = gradients(system, batch, recipe.weights_of(0.0, 1.0, 0.0))
    assert {n.split(".")[0] for n in words} == {"text", "predict"}, "guessing words sees no picture"


def test_the_tower_computes_a_quarter_of_the_patches_in_one_pass_and_all_in_the_other(system, batch):
    seen = []
    system.vision.body.blocks[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    system.embed_masked(batch)
    assert sorted(seen) == [1 + int(16 * 0.25), 17]


def test_pixels_are_judged_where_they_were_hidden_alone(system, batch):
    masking = system.sampler(6, (4, 4))
    target = system.target(batch["image"], masking)
    assert target.shape == (6, 12, 192)
    torch.testing.assert_close(target.mean(-1), torch.zeros(6, 12), atol=1e-4, rtol=0)
    visible = (~masking.mask).view(6, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    hidden = torch.where(visible, batch["image"], torch.randn_like(batch["image"]))
    torch.testing.assert_close(system.draw(hidden, masking), system.draw(batch["image"], masking), msg="what is hidden is not read")
    changed = torch.where(visible, torch.randn_like(batch["image"]), batch["image"])
    torch.testing.assert_close(system.target(changed, masking), target, msg="and what is visible is not asked for")


def test_words_are_judged_where_they_were_hidden_over_the_whole_batch(system, batch):
    torch.manual_seed(7)
    seen = system.embed_masked(batch)
    torch.manual_seed(7)
    system.sampler(6, (4, 4))
    hidden, chosen = system.hide(batch["text"])
    said = system.predict(system.text(hidden, mask=batch["text"] != 0).tokens, system.text.embed.weight)
    want = F.cross_entropy(said[chosen], batch["text"][chosen]) if chosen.any() else torch.zeros(())
    torch.testing.assert_close(system.compare_masked(seen)["words"], want)
    assert not chosen[:, 0].any() and not chosen[:, -1].any(), "start and end are never hidden"


def test_arms_share_weights_and_data_and_differ_in_their_objective_alone():
    """Same seed, same parameters and masks whatever the weights of the terms are."""
    arms = []
    for weights in (recipe.weights_of(0.0, 0.0), recipe.weights_of(1.0, 0.1), recipe.weights_of(1.0, 0.0, 0.0)):
        preset = preset_of("mae_clip").but(**{"stages.0.weights": weights})
        torch.manual_seed(0)
        arms.append(preset.config.build().state_dict())
        assert preset.feed == preset_of("mae_clip").feed
    assert all(torch.equal(v, other[k]) for other in arms[1:] for k, v in arms[0].items())


@pytest.mark.parametrize("pool", recipe.POOLS)
def test_pooling_is_a_factor(pool, batch):
    torch.manual_seed(0)
    made = recipe.config(32, 8, (32, 2, 2), (32, 2, 2), (16, 1, 2), 16, 100, 12, 4, (0, 1, 2), pool).build()
    tokens, head = made.vision(batch["image"]).tokens, made.image_head
    with torch.no_grad():
        want = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, 1:].mean(1), "max": lambda: tokens[:, 1:].amax(1),
                "attention": lambda: head.pool(tokens[:, 1:])}[pool]()
    project = head.out if hasattr(head, "out") else head
    torch.testing.assert_close(made.encode_image(batch["image"]), F.normalize(project(want), dim=-1), rtol=1e-4, atol=1e-5)
    got = gradients(made, batch, recipe.weights_of(0.0, 0.0))
    assert {n for n, _ in made.image_head.named_parameters(prefix="image_head") if n.rpartition(".")[2] in ("weight", "query")} <= set(got)
    assert any(n.startswith("vision.patch") for n in got) and made.encode_patches(batch["image"]).shape == (6, 4, 4, 16)
    name = {"cls": "paper"}.get(pool, f"{pool}_pooled")
    assert preset_of("mae_clip", name).config.vision.pool == {"cls": "cls", "mean": "mean"}.get(pool, "none")


def test_the_decoder_can_be_thrown_away(system, batch):
    before = system.eval().encode_image(batch["image"])
    system.decoder = system.predict = None
    assert torch.equal(before, system.encode_image(batch["image"]))
