"""FILIP's essence (Yao et al. 2022); its loss against the dense form stands in tests/objectives/test_tokenwise.py."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.telling import Rewrites
from polysense.objectives.tokenwise import best_tokens, token_nce

recipe = polysense.load("filip")
BODY = recipe.body(24, 2, 2)


@pytest.fixture()
def filip():
    torch.manual_seed(0)
    return recipe.config(32, 8, BODY, BODY, 16, 100, 12, 2, keep=1.0).build()


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(5, 60, (5, 8), generator=g)
    for row, at in enumerate((7, 5, 3, 7, 4)):
        text[row, at:] = 2
    return {"image": torch.randn(5, 3, 32, 32, generator=g), "text": text}


def test_every_token_is_projected_and_of_unit_length(filip, batch):
    seen = filip.embed_tokens(batch)
    assert seen["patches"].shape == (5, 16, 16) and seen["words"].shape == (5, 8, 16)
    torch.testing.assert_close(seen["patches"].norm(dim=-1), torch.ones(5, 16))
    torch.testing.assert_close(seen["words"].norm(dim=-1), seen["mask"].float())
    tokens = filip.vision(batch["image"]).tokens[:, 1:]
    torch.testing.assert_close(seen["patches"], F.normalize(tokens @ filip.image_head.weight.T, dim=-1))
    assert seen["mask"].sum(1).tolist() == [8, 6, 4, 8, 5], "up to and with the end token"


def test_the_loss_is_late_interaction_with_the_learned_scale(filip, batch):
    seen = filip.embed_tokens(batch)
    see = torch.stack([torch.stack([(v @ t[m].T).max(1).values.mean() for t, m in zip(seen["words"], seen["mask"], strict=True)])
                       for v in seen["patches"]])
    say = torch.stack([torch.stack([(v @ t[m].T).max(0).values.mean() for v in seen["patches"]])
                       for t, m in zip(seen["words"], seen["mask"], strict=True)])
    target = torch.arange(5)
    want = (F.cross_entropy(filip.scale * see, target) + F.cross_entropy(filip.scale * say, target)) / 2
    torch.testing.assert_close(filip.compare_tokens(seen)["contrast"], want, rtol=1e-4, atol=1e-5)


def test_a_quarter_of_the_tokens_is_shown_to_others(batch):
    filip = recipe.config(32, 8, BODY, BODY, 16, 100, 12, 2).build()
    assert filip.keep == 0.25 == preset_of("filip", "paper").config.keep
    seen = filip.embed_tokens(batch)
    torch.testing.assert_close(filip.compare_tokens(seen)["contrast"], token_nce(seen["patches"], seen["words"], seen["mask"], filip.scale, 0.25))
    shown, mask = best_tokens(seen["words"], seen["mask"], seen["patches"], torch.ones(5, 16, dtype=torch.bool), 0.25)
    assert mask.sum(1).tolist() == [2, 2, 1, 2, 2] and shown.shape[1] == 2


def test_padding_changes_nothing(filip, batch):
    longer = torch.cat([batch["text"], torch.full((5, 3), 7)], 1)
    a, b = (filip.compare_tokens(filip.embed_tokens(batch | {"text": t}))["contrast"] for t in (batch["text"], longer))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(filip.encode_words(longer)[:, :8], filip.encode_words(batch["text"]), rtol=1e-4, atol=1e-5)


def test_the_alignment_map_is_each_patchs_best_word_and_never_padding(filip, batch):
    with torch.no_grad():
        at = filip.align(batch["image"], batch["text"])
        seen = filip.embed_tokens(batch)
    for i in range(5):
        words = seen["words"][i][seen["mask"][i]]
        assert torch.equal(at[i].flatten(), (seen["patches"][i] @ words.T).argmax(1))
    heat = filip.ground_text(batch["image"], batch["text"])
    assert heat.shape == (5, 4, 4) and heat.amin() >= 0
    torch.testing.assert_close(heat.amax((1, 2)), torch.ones(5))


def test_one_vector_of_each_is_the_mean_patch_and_the_end_token(filip, batch):
    filip.eval()
    tokens = filip.vision(batch["image"]).tokens[:, 1:].mean(1)
    torch.testing.assert_close(filip.encode_image(batch["image"]), F.normalize(filip.image_head(tokens), dim=-1))
    end = torch.tensor([7, 5, 3, 7, 4])
    torch.testing.assert_close(filip.encode_text(batch["text"]), filip.encode_words(batch["text"])[torch.arange(5), end], rtol=1e-4, atol=1e-5)


def test_paper_is_the_large_form():
    c = preset_of("filip", "paper").config
    assert (c.vision.patch, c.vision.body.width, c.vision.body.depth, c.text.body.width, c.image_head.out) == (14, 1024, 24, 768, 256)
    assert preset_of("filip", "paper").stages[0].optim.name == "lamb"
    for name in ("paper", "base"):
        feed = preset_of("filip", name).feed
        assert [type(t) for t in feed.told] == [Rewrites] and feed.train_image.operations, "both pictures and captions are augmented"


def test_gradient_caching_changes_nothing(batch):
    from polysense.train.fit import fit
    states = []
    for chunk in (None, 2):
        torch.manual_seed(0)
        system = recipe.config(32, 8, BODY, BODY, 16, 100, 12, 2, keep=0.5).build()
        stage = recipe.tiny().stages[0].but(steps=1, batch_size=5, precision="fp32", chunk=chunk)
        list(fit(system, stage, [batch]))
        states.append(system.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=2e-5, msg=name)
