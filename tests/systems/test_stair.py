"""STAIR's essence (Chen et al. 2023): each test fails if its mechanism is replaced by a shortcut."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.system import After
from polysense.objectives.contrastive import info_nce
from polysense.objectives.sparse import flops
from polysense.train.fit import fit

recipe = polysense.load("stair")


@pytest.fixture()
def stair():
    torch.manual_seed(0)
    return recipe.config(32, 8, (24, 2, 2), (24, 2, 2), 60, 12, (0, 1, 2)).build()


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(5, 60, (5, 8), generator=g)
    text[:, 0] = 1
    for row, at in enumerate((7, 5, 3, 7, 4)):
        text[row, at], text[row, at + 1:] = 2, 0
    return {"image": torch.randn(5, 3, 32, 32, generator=g), "text": text}


def test_weights_are_log_one_plus_relu_of_the_largest_word_score(stair, batch):
    for weights, tokens, head in ((stair.encode_image_terms(batch["image"]), stair.vision(batch["image"]).tokens, stair.image_head),):
        scores = F.linear(head.head.norm(head.head.act(head.head.pre(tokens))), head.words, head.head.bias)
        torch.testing.assert_close(weights, torch.log1p(scores.amax(1).clamp(min=0)))
        assert (weights >= 0).all() and weights.shape == (5, 60)


def test_padding_wins_no_maximum(stair, batch):
    stair.eval()
    want = stair.encode_text_terms(batch["text"])
    longer = torch.cat([batch["text"], torch.zeros(5, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(stair.encode_text_terms(longer), want, rtol=1e-4, atol=1e-5)
    for i, n in enumerate((8, 6, 4, 8, 5)):
        torch.testing.assert_close(stair.encode_text_terms(batch["text"][i:i + 1, :n])[0], want[i], rtol=1e-4, atol=1e-5)
    tokens = stair.text.tower(batch["text"]).tokens
    real = batch["text"] != 0
    scores = stair.text_head.head(tokens, stair.text_head.words).masked_fill(~real[..., None], -torch.inf).amax(1)
    torch.testing.assert_close(want, torch.log1p(scores.relu()), rtol=1e-4, atol=1e-5)


def test_flops_counts_expected_work():
    usage = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]).float()
    assert flops(usage).item() == pytest.approx(0.5 ** 2 + 0.25 ** 2 + 0.25 ** 2)
    balanced, always = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
    assert flops(balanced) < flops(always), "sparse balanced use costs less than one word that is always on"


def test_terms_are_contrast_by_cosine_and_ramped_flops_of_each_tower(stair, batch):
    seen = stair.embed_terms(batch)
    losses = stair.compare_terms(seen)
    a, b = (F.normalize(seen[k], dim=-1) for k in ("image", "text"))
    torch.testing.assert_close(losses["contrast"], info_nce(a, b, stair.scale))
    torch.testing.assert_close(losses["text_flops"], stair.ramp * flops(seen["text"]))
    for progress, want in ((0.0, 0.01), (0.15, 0.25), (0.3, 1.0), (0.9, 1.0)):
        stair.after_step(After(step=1, progress=progress, optimizer=torch.optim.SGD(stair.parameters(), lr=0.1), keep={}))
        assert stair.ramp.item() == pytest.approx(want, abs=1e-6)


def test_grounding_keeps_only_the_words_of_the_caption(stair, batch):
    plain, grounded = stair.embed_terms(batch), stair.embed_grounded(batch)
    assert torch.equal(plain["image"], grounded["image"])
    for i, row in enumerate(batch["text"].tolist()):
        own = sorted(set(row) - {0, 1, 2})
        others = [k for k in range(60) if k not in own]
        assert (grounded["text"][i, others] == 0).all() and torch.equal(grounded["text"][i, own], plain["text"][i, own])


def test_the_three_stages_are_part_of_the_system(stair, batch):
    ground, expand, refine = preset_of("stair").stages
    assert ground.embed is recipe.STAIR.embed_grounded and refine.embed is expand.embed is recipe.STAIR.embed_terms
    before = {k: v.clone() for k, v in stair.state_dict().items()}
    list(fit(stair, expand.but(steps=2, batch_size=5, precision="fp32"), [batch, batch]))
    after = stair.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith(("vision.", "image_head."))), "the picture tower stands still"
    assert not torch.equal(after["text_head.words"], before["text_head.words"])
    list(fit(stair, refine.but(steps=1, batch_size=5, precision="fp32"), [batch]))
    assert not torch.equal(stair.state_dict()["image_head.words"], before["image_head.words"])


def test_an_inverted_index_ranks_as_the_dense_products_do(stair, batch):
    images, texts = stair.encode_image_terms(batch["image"]), stair.encode_text_terms(batch["text"])
    lists: dict[int, list[tuple[int, float]]] = {}
    for i, row in enumerate(images.tolist()):
        for k, w in enumerate(row):
            if w:
                lists.setdefault(k, []).append((i, w))
    for j, row in enumerate(texts.tolist()):
        scores = [0.0] * 5
        for k, w in enumerate(row):
            for i, v in lists.get(k, ()) if w else ():
                scores[i] += w * v
        torch.testing.assert_close(torch.tensor(scores), images @ texts[j], rtol=1e-4, atol=1e-5)
    silenced = images.clone()
    silenced[:, 7] = 0
    told = stair.terms(silenced, most=60)
    assert all(w > 0 for row in told for _, w in row) and all(7 not in dict(row) for row in told)
    assert [i for i, _ in stair.terms(images, 3)[0]] == images[0].topk(3).indices.tolist()


def test_patches_say_words_too(stair, batch):
    assert stair.encode_patches(batch["image"]).shape == (5, 4, 4, 60)
