"""Sources by name, joins, splits, and the listing."""
import os
import subprocess
import sys

import numpy as np
import pytest

from polysense.base.errors import UserError
from polysense.data import data_root, list_sources, source
from polysense.data.named import NAMED, offers_of
from polysense.data.readers import segment_mask
from polysense.data.sources import FOLLOWS, HEAVY, ListSource, held_out, offered

HERE = data_root()
CASES = [(name, split) for name, e in NAMED.items() for split in (e.splits or ("train", "val"))]


@pytest.mark.parametrize(("name", "split"), CASES, ids=lambda v: str(v))
def test_every_named_set_gives_what_it_offers(name: str, split: str):
    if name != "digits" and not (HERE / name).is_dir():
        pytest.skip(f"{name} is not under {'$POLYSENSE_DATA' if 'POLYSENSE_DATA' in os.environ else 'the data folder'}")
    if "video" in NAMED[name].offers:
        pytest.importorskip("av")
    if "audio" in NAMED[name].offers:
        pytest.importorskip("soundfile")
    s = source(name, split)
    assert len(s) > 0 and s.name == name and set(s.offers) >= set(offers_of(name)) and not s.notes
    for i in (0, len(s) - 1):
        sample = s[i]
        assert sample["id"] == s.id(i)
        says = {"image": "image", "text": "captions", "label": "label", "boxes": "boxes", "box_label": "box_label", "mask": "mask", "tags": "tags",
                "question": "question", "answer": "answer", "audio": "audio", "video": "video"}
        assert all(says[k] in sample for k in s.offers if k in says)
        if "image" in sample:
            assert sample["image"].mode == "RGB" and (s.largest is None or max(sample["image"].size) <= s.largest)
        if "captions" in sample and "text" in s.offers:
            assert sample["captions"] and all(isinstance(c, str) and c for c in sample["captions"])
        if "label" in s.offers:
            assert 0 <= sample["label"] < len(s.classes)
        if "boxes" in sample:
            boxes = np.asarray(sample["boxes"])
            assert boxes.shape == (len(sample["box_label"]), 4) and boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, 2:] > boxes[:, :2]).all()
        if "mask" in sample and "mask" in s.offers:
            w, h = sample["image"].size
            assert sample["mask"].shape == (len(sample["box_label"]), h, w) and sample["mask"].any((1, 2)).all()
        if "audio" in sample:
            assert sample["audio"].dtype == np.float32 and sample["audio"].ndim == 1 and np.abs(sample["audio"]).max() <= 1 and s.rate
        if "video" in sample:
            assert sample["video"].dtype == np.uint8 and sample["video"].ndim == 4 and sample["video"].shape[-1] == 3


def test_digits_split_and_say_what_they_are():
    train, test = source("digits"), source("digits", "test")
    assert len(train) + len(test) == 1797 and not {train.id(i) for i in range(len(train))} & {test.id(i) for i in range(len(test))}
    for i in (0, 17):
        assert all(train.classes[train[i]["label"]] in c for c in train[i]["captions"])
    assert source("digits", "val").split == source("digits", "dev").split == "test"           # the only held-out part stands for the others


def test_unknown_names_and_splits_are_refused_with_advice():
    with pytest.raises(UserError, match="did you mean digits"):
        source("digitz")
    with pytest.raises(UserError, match="it has train, test"):
        source("digits", "nonsense")
    with pytest.raises(UserError, match="data list"):
        source("+")


def test_missing_set_says_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match=r"not on this machine.*put its folder into"):
        source("emoji", root=tmp_path)


def test_data_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYSENSE_DATA", str(tmp_path / "a"))
    assert data_root() == tmp_path / "a"
    monkeypatch.delenv("POLYSENSE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_root() == tmp_path / "polysense" / "data"


def test_listing_knows_size_and_place_and_needs_no_torch(tmp_path):
    info = {s.name: s for s in list_sources(tmp_path)}
    assert info["digits"].where == "built in" and info["emoji"].size is None and "text" in info["emoji"].offers
    assert info["grocery_store"].splits == ("train", "val", "test")
    (tmp_path / "imagenet_samples").mkdir()
    (tmp_path / "imagenet_samples" / "images.tar").write_bytes(b"1234")
    assert {s.name: s for s in list_sources(tmp_path)}["imagenet_samples"].size == 4
    code = "import sys; from polysense.data import list_sources; list_sources(); print(sorted({'torch', 'kornia', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def _list(name, labels, classes, offers=("image", "label")):
    samples = [{"id": str(k), "image": np.full((4, 4, 3), k, np.uint8), "label": lab, "captions": ["x"]} for k, lab in enumerate(labels)]
    return ListSource(name, samples, offers, classes=classes)


def test_joined_sources_share_offers_and_renumber_labels():
    from polysense.data.sources import ConcatSource

    one, two = _list("one", [0, 1], ("cat", "dog"), ("image", "label", "text")), _list("two", [0, 1, 1], ("dog", "cow"))
    both = ConcatSource([one, two])
    assert len(both) == 5 and [both.id(i) for i in range(5)] == ["one/0", "one/1", "two/0", "two/1", "two/2"]
    assert set(both.offers) == {"index", "image", "views", "label"} and both.classes == ("cat", "dog", "cow")
    assert both.labels() == [0, 1, 1, 2, 2] and np.asarray(both[3]["image"])[0, 0, 0] == 1 and both[3]["id"] == "two/1"
    joined = source("digits+digits")
    assert joined.name == "digits+digits" and len(joined) == 2 * len(source("digits")) and joined.classes == source("digits").classes


def test_held_out_part_is_a_fixed_tenth_and_does_not_move_when_samples_are_added():
    def ids(n, split):
        s = held_out(ListSource("s", [{"id": f"f{i}"} for i in range(n)], ()), split)
        return {s.id(i) for i in range(len(s))}

    small, large = ids(500, "val"), ids(1000, "val")
    assert small == {i for i in large if int(i[1:]) < 500} and 20 < len(small) < 80 and ids(500, "test") == small
    assert ids(500, "train") | small == ids(500, "all") and not ids(500, "train") & small
    assert len(ids(2, "val")) == 1 and len(ids(1, "train")) == 1


def test_offers_follow():
    assert offered(["image", "text"]) == ("index", "image", "text", "views", "text_mask")
    assert set(FOLLOWS) >= {"image", "text", "video"} and "image" in HEAVY


def test_run_lengths_and_polygons_become_masks():
    want = np.zeros((4, 5), bool)
    want[1:3, 2:4] = True
    flat = want.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int), [0]])))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    assert (segment_mask({"size": [4, 5], "counts": runs}, (4, 5)) == want).all()
    packed, sent = "", []
    for k, run in enumerate(runs):                                             # the published packing, written out the slow way
        value = run - (runs[k - 2] if k > 2 else 0)
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            packed += chr((bits | (32 if more else 0)) + 48)
        sent.append(run)
    assert (segment_mask({"size": [4, 5], "counts": packed}, (4, 5)) == want).all()
    assert segment_mask([[1, 1, 3, 1, 3, 3, 1, 3]], (5, 5))[1:4, 1:4].all()
