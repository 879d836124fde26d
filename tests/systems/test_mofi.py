"""MOFI's essence (Wu et al. 2024): the sampled margin softmax, the two sides, and the data engine."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake import fake_batch

import polysense
from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.data.entities import Entity, EntityBase, Linked, labels_of, links_of, worst
from polysense.data.sources import ListSource
from polysense.objectives.sampled import margin_softmax, sample_classes

recipe = polysense.load("mofi")


@pytest.fixture()
def system():
    torch.manual_seed(0)
    return preset_of("mofi").config.but(entities=40, sampled=10).build()


@pytest.fixture(scope="module")
def batch():
    return fake_batch(preset_of("mofi"), ("image", "text", "label"), n=6) | {"label": torch.tensor([3, 30, 3, -1, 17, 39])}


def test_all_classes_and_no_margin_are_the_scaled_cosine_softmax():
    feature, rows, label = torch.randn(6, 8), torch.randn(12, 8), torch.tensor([0, 11, 4, 4, 7, 2])
    cosine = F.normalize(feature, dim=1) @ F.normalize(rows, dim=1).T
    want = F.cross_entropy(20 * cosine, label)
    torch.testing.assert_close(margin_softmax(feature, rows, label, torch.arange(12), 20.0, 0.0), want)
    harder = margin_softmax(feature, rows, label, torch.arange(12), 20.0, 0.3)
    one_hot = F.one_hot(label, 12)
    torch.testing.assert_close(harder, F.cross_entropy(20 * (cosine - 0.3 * one_hot), label))
    assert harder > want


def test_chosen_classes_hold_all_of_the_batch_without_duplicates():
    label = torch.tensor([5, 90, 5, -1, 33])
    seen = set()
    for _ in range(20):
        chosen = sample_classes(label, 100, 12)
        assert len(chosen) == len(set(chosen.tolist())) == 12 and {5, 33, 90} <= set(chosen.tolist()) and torch.equal(chosen, chosen.sort().values)
        seen |= set(chosen.tolist())
    assert len(seen) > 60, "negatives are drawn anew"
    assert torch.equal(sample_classes(label, 100, 500), torch.arange(100)) and len(sample_classes(torch.arange(9), 100, 4)) == 9


def test_rows_that_were_not_chosen_get_no_gradient():
    rows, label = torch.randn(50, 8).requires_grad_(), torch.tensor([1, 44, 7])
    chosen = sample_classes(label, 50, 9)
    grad, = torch.autograd.grad(margin_softmax(torch.randn(3, 8), rows, label, chosen, 16.0, 0.2), rows)
    left = torch.ones(50, dtype=torch.bool)
    left[chosen] = False
    assert (grad[left] == 0).all() and (grad[chosen].abs().sum(1) > 0).all()


def test_samples_without_an_entity_are_left_out_of_the_classifier():
    feature, rows = torch.randn(4, 8), torch.randn(9, 8)
    label, chosen = torch.tensor([2, -1, 8, -1]), torch.arange(9)
    want = margin_softmax(feature[[0, 2]], rows, label[[0, 2]], chosen, 16.0, 0.2)
    torch.testing.assert_close(margin_softmax(feature, rows, label, chosen, 16.0, 0.2), want)
    assert margin_softmax(feature, rows, torch.full((4,), -1), chosen, 16.0, 0.2) == 0


def test_either_side_alone_leaves_the_other_without_gradient(system, batch):
    def reached(share: float) -> set[str]:
        system.zero_grad()
        system.classify_and_compare(system.embed_labelled(batch)).total(recipe.weights_of(share)).backward()
        return {n.split(".")[0] for n, p in system.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached(1.0) == {"vision", "entities"}
    assert reached(0.0) == {"vision", "text", "text_head", "log_scale"}
    assert reached(0.5) == reached(0.0) | reached(1.0)


def test_the_classifier_is_separate_from_the_text_tower_and_grows_with_the_entities(system):
    assert system.entities.shape == (40, 192) and "entities" in dict(system.named_parameters())
    with pytest.raises(UserError, match=r"set config\.entities"):
        system.classify_and_compare({"image": torch.randn(2, 192), "text": torch.randn(2, 192), "label": torch.tensor([0, 40])})
    with pytest.raises(UserError, match="at least two"):
        preset_of("mofi").config.but(sampled=1).build()


# The data engine

BASE = EntityBase([Entity("Q1", "jaguar", "a big spotted cat"), Entity("Q2", "jaguar", "a british car"), Entity("Q3", "sea lion", "an eared seal"),
                   Entity("Q4", "lion", "a big cat")])


def test_names_are_found_the_longest_first_plurals_too():
    assert BASE.mentioned("Two sea lions and a lion, near a JAGUAR.") == [[2], [3], [0, 1]] and BASE.mentioned("nothing here") == []


def test_an_ambiguous_name_is_what_the_picture_shows_and_what_it_does_not_show_gets_no_label():
    def like(word: str):
        return lambda texts: [0.9 if word in t else 0.1 for t in texts]
    assert BASE.link("a jaguar", like("car"), 0.5) == [(1, 0.9)] and BASE.link("a jaguar", like("spotted"), 0.5) == [(0, 0.9)]
    assert BASE.link("a jaguar", like("house"), 0.5) == []
    assert [e for e, _ in BASE.link("a lion in a jaguar", like("car"), 0.05)] == [1, 3], "best first"


def test_linked_pairs_have_labels_texts_and_no_rare_entities():
    grey = np.zeros((8, 8, 3), np.uint8)
    said = ["a jaguar parked", "my jaguar", "one lion", "a cloud"]
    data = ListSource("web", [{"id": i, "image": grey, "captions": [c]} for i, c in enumerate(said)], ("image", "text"))
    links = links_of([[c] for c in said], BASE, lambda i, texts: [1.0 if "car" in t or "big cat" in t else 0.0 for t in texts])
    assert links == [{1: 1.0}, {1: 1.0}, {3: 1.0}, {}]
    made = Linked(data, BASE, labels_of(links, 0.5, rare=2))
    assert [made.about(i)["label"] for i in range(4)] == [1, 1, -1, -1] and made.classes[1] == "Q2" and "label" in made.offers
    assert made.labels() == [1, 1, -1, -1]
    assert made.about(0)["captions"] == ["a jaguar parked", "jaguar, a british car"] and made.about(3)["captions"] == ["a cloud"]
    assert labels_of(links, 1.5) == [-1] * 4 and labels_of(links, 0.5) == [1, 1, 3, -1]
    scored = [{0: 0.1, 1: 0.9}, {2: 0.2}, {}, {3: 0.8}, {0: 0.5}]
    assert labels_of(scored, worst(scored, 0.4)) == [1, -1, -1, 3, 0] and worst(scored, 0.0) == worst([{}], 0.5) == -np.inf
    with pytest.raises(UserError, match="an id of its own"):
        EntityBase([Entity("Q1", "a"), Entity("Q1", "b")])
