"""FILIP's essence (Yao et al. 2022); its loss against the dense form stands in tests/objectives/test_tokenwise.py."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.telling import Rewrites
from polysense.data.sources import ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.objectives.tokenwise import best_tokens, token_nce
from polysense.pipeline import Pipeline
from polysense.pipeline.words import label_scores
from polysense.tasks import retrieval, zero_shot

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


@pytest.fixture(scope="module")
def subject():
    """A FILIP with a tokenizer, and six pictures of three kinds."""
    torch.manual_seed(0)
    preset = recipe.tiny().but(config=recipe.config(32, 8, BODY, BODY, 16, 300, 24, 2)).but(**{
        "feed.image.size": 32, "feed.train_image.size": 32, "feed.text.vocab": 300, "feed.text.length": 24})
    tokenizer = make_tokenizer(preset.feed.text, ["a photo of a red cup.", "the blue hat and a green tree in it."])
    pixels = torch.randint(0, 255, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    photos = ListSource("kinds", [{"id": i, "image": pixels[i], "label": i % 3} for i in range(6)], ("image", "label"),
                        classes=("red cup", "blue hat", "green_tree"))
    return Pipeline(preset.config.build(), preset, tokenizer, id="filip"), photos


NAMES, TEMPLATES = ("red cup", "blue hat", "green tree"), ("a photo of a {}.", "the {} in it.")


def by_hand(filip, tokenizer, images):
    """s_I of each picture with each prompt, patch by patch; similarities, not texts, are averaged over templates."""
    system = filip.system.eval()
    with torch.no_grad():
        patches = system.encode_patches(images).flatten(1, 2)
        rows = []
        for name in NAMES:
            each = []
            for template in TEMPLATES:
                words, mask = system.words(tokenizer([template.replace("{}", name)]).to(images.device))
                each.append(torch.stack([(p @ words[0][mask[0]].T).max(1).values.mean() for p in patches]))
            rows.append(torch.stack(each).mean(0))
    return torch.stack(rows, 1).cpu()


def test_zero_shot_labels_compare_patches_with_words_and_average_similarities_over_templates(subject, monkeypatch):
    filip, photos = subject
    pictures = [photos.load(i, "image") for i in range(6)]
    want = by_hand(filip, filip.tokenizer, filip.read_images(pictures))
    got = torch.from_numpy(label_scores(filip, pictures, NAMES, TEMPLATES))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    one_vector = torch.from_numpy(filip.encode(images=pictures) @ filip.prompts(NAMES, TEMPLATES).T)
    assert (got - one_vector).abs().max() > 0.1, "one vector of each says something else"
    probabilities = {n: p for n, p in filip.label(pictures, NAMES, TEMPLATES)[0].labels}
    own = (filip.scale * got[0]).softmax(0)
    assert [probabilities[n] for n in NAMES] == pytest.approx(own.tolist(), abs=1e-5)
    result = zero_shot.run(filip, photos, templates=TEMPLATES)
    right = (want.argmax(1) == torch.arange(6) % 3).float().mean().item()
    assert result.metrics["accuracy"].value == pytest.approx(right)
    assert filip.label(pictures, list(NAMES[:1]))[0].labels[0][0] == "red cup"


def test_retrieval_ranks_captions_by_patches_and_pictures_by_words(subject):
    filip, photos = subject
    said = [["a red cup.", "the cup"], ["a blue hat."], ["a green tree in it.", "the tree"]]
    captioned = ListSource("said", [{"id": i, "image": photos.load(i, "image"), "captions": c} for i, c in enumerate(said)], ("image", "text"))
    result, texts = retrieval.run(filip, captioned), [c for each in said for c in each]
    system, owner = filip.system.eval(), [0, 0, 1, 2, 2]
    with torch.no_grad():
        patches = system.encode_patches(filip.read_images([photos.load(i, "image") for i in range(3)])).flatten(1, 2)
        words = [w[0][m[0]] for w, m in (system.words(filip.read_texts([t])) for t in texts)]
    see = [[float((p @ w.T).max(1).values.mean()) for w in words] for p in patches]
    say = [[float((w @ p.T).max(1).values.mean()) for p in patches] for w in words]
    first = [any(owner[j] == i for j in [max(range(5), key=row.__getitem__)]) for i, row in enumerate(see)]
    back = [max(range(3), key=row.__getitem__) == owner[j] for j, row in enumerate(say)]
    assert result.metrics["image_to_text_r1"].value == pytest.approx(sum(first) / 3)
    assert result.metrics["text_to_image_r1"].value == pytest.approx(sum(back) / 5)
