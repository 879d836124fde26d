"""UniCL's essence (Yang et al. 2022): each test fails if its mechanism is replaced by a shortcut."""
import pytest
import torch
import torch.nn.functional as F

import polysense
from polysense.base.catalogue import preset_of
from polysense.data.loader import Loader
from polysense.data.sources import ConcatSource, ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.data.told import told
from polysense.objectives.contrastive import apart, info_nce
from polysense.towers.swin import Swin

recipe = polysense.load("unicl")
TOWER = Swin.Config(patch=4, base=8, depths=(1, 1), heads=(1, 2), window=4)


@pytest.fixture()
def unicl():
    torch.manual_seed(0)
    return recipe.UniCL.Config(**recipe.swin_pair(TOWER, (16, 1, 2), 12, 100, 12, 2)).build()


def seen(n: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, 12, generator=g), dim=-1).requires_grad_() for _ in range(2))
    return {"image": image, "text": text, "label": torch.tensor([0, 1, 0, 2, -1, -1, 1, 0])[:n]}


def dense(made, scale, label):
    """The loss written out: targets are rows of the matrix [y_i = y_j], each divided by its number of positives."""
    logits = scale * made["image"] @ made["text"].T
    same = (label[:, None] == label).float()
    rows = -(same / same.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(same / same.sum(1, keepdim=True) * logits.T.log_softmax(1)).sum(1).mean()
    return (rows + columns) / 2


def test_loss_is_soft_cross_entropy_to_the_matrix_of_equal_labels(unicl):
    made = seen()
    label = torch.tensor([0, 1, 0, 2, 100, 101, 1, 0])               # web pairs: fresh ids above the largest class
    torch.testing.assert_close(unicl.compare_labelled(made)["contrast"], dense(made, unicl.scale, label))


def test_labels_all_different_are_clip_in_value_and_gradient(unicl):
    made = seen() | {"label": torch.randperm(8)}
    ours = torch.autograd.grad(unicl.compare_labelled(made)["contrast"], (made["image"], made["text"]))
    clip = info_nce(made["image"], made["text"], unicl.scale)
    torch.testing.assert_close(unicl.compare_labelled(made)["contrast"], clip, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, torch.autograd.grad(clip, (made["image"], made["text"])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_one_text_a_class_from_pictures_to_texts_is_softmax_classification():
    """Rows of the loss, with one copy of each class's text as column, are cross-entropy with weights made of texts."""
    from polysense.objectives.contrastive import multi_positive
    image, names = (F.normalize(torch.randn(n, 6), dim=-1) for n in (3, 3))
    label = torch.tensor([2, 0, 1])
    both = multi_positive(image, names, 5.0, label, torch.arange(3))
    rows = F.cross_entropy(5 * image @ names.T, label)
    columns = F.cross_entropy(5 * names @ image.T, label.argsort())
    torch.testing.assert_close(both, (rows + columns) / 2)


def test_a_duplicate_class_attracts_both_texts(unicl):
    made = seen(4) | {"label": torch.tensor([3, 3, 1, 2])}
    pull, = torch.autograd.grad(unicl.compare_labelled(made)["contrast"], made["text"])
    clip, = torch.autograd.grad(info_nce(made["image"], made["text"], unicl.scale), made["text"])
    towards = made["image"][0].detach()
    assert (pull[1] @ towards) < (clip[1] @ towards), "the picture of sample 0 pulls the text of sample 1, where CLIP pushes it away"
    logits = torch.zeros(4, 4)
    target = dense({"image": torch.eye(4), "text": torch.eye(4)}, 0.0, made["label"])
    assert target.item() == pytest.approx(float(torch.log(torch.tensor(4.0)))) and logits.sum() == 0


def test_web_pairs_are_positives_of_nobody_whatever_the_class_numbers():
    label = torch.tensor([-1, 10 ** 9, -1, 10 ** 9 + 1, -1, 0])
    own = apart(label)
    assert len(own.unique()) == 6 and torch.equal(own[label >= 0], label[label >= 0]) and (own[label < 0] < 0).all()


def test_loss_does_not_know_the_numbers_of_classes_and_rows_of_targets_sum_to_one(unicl):
    made = seen()
    again = made | {"label": torch.tensor([7, 900, 7, 3, -1, -1, 900, 7])}
    torch.testing.assert_close(unicl.compare_labelled(made)["contrast"], unicl.compare_labelled(again)["contrast"])
    same = {"image": F.normalize(torch.ones(8, 12), dim=-1), "text": F.normalize(torch.ones(8, 12), dim=-1), "label": made["label"]}
    assert unicl.compare_labelled(same)["contrast"].item() == pytest.approx(float(torch.log(torch.tensor(8.0))), abs=1e-5)


def test_of_a_mixed_batch_captioned_pictures_are_positives_of_nobody_and_named_ones_of_their_kind(unicl):
    """Through the feed of the preset: prompts of the class, drawn anew, and captions whose label is nobody's."""
    grey = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    kinds = ListSource("kinds", [{"id": i, "image": grey, "label": i % 2} for i in range(40)], ("image", "label"), classes=("cat", "dog"))
    web = ListSource("web", [{"id": i, "image": grey, "captions": ["two birds on a wire"]} for i in range(40)], ("image", "text"))
    feed = preset_of("unicl").feed.but(**{"told.0.templates": ("a photo of a {}.", "a drawing of a {}.")})
    mixed = told(ConcatSource([kinds, web]), feed)
    words = make_tokenizer(feed.text, mixed.captions())
    batch = next(iter(Loader(mixed, feed, words, batch_size=64, seed=0, needs=("image", "text", "label"))))
    assert set(batch["label"].tolist()) == {-1, 0, 1}
    assert len({tuple(t.tolist()) for t in batch["text"][batch["label"] == 0]}) == 2, "both templates are drawn"
    made = {"image": F.normalize(torch.randn(64, 12), dim=-1), "text": F.normalize(torch.randn(64, 12), dim=-1), "label": batch["label"]}
    alone = torch.where(batch["label"] < 0, torch.arange(64) + 100, batch["label"])
    torch.testing.assert_close(unicl.compare_labelled(made)["contrast"], dense(made, unicl.scale, alone))


def test_image_tower_is_a_swin_and_text_tower_clips(unicl):
    paper = preset_of("unicl", "paper").config
    assert (paper.vision.base, paper.vision.depths, paper.vision.heads, paper.vision.window) == (96, (2, 2, 6, 2), (3, 6, 12, 24), 7)
    assert (paper.text.body.width, paper.text.body.depth, paper.text.length) == (512, 12, 77)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(unicl.vision(image).pooled, unicl.vision.dense(image).flatten(1, 2).mean(1))
    assert unicl.encode_patches(image).shape == (2, 4, 4, 12)
