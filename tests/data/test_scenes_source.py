"""The source: determinism, splits, held-out pairs, options, and what it offers."""
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest

from polysense.base.errors import UserError
from polysense.base.plan import Feed, ImagePlan
from polysense.data.loader import Loader
from polysense.data.scenes import ScenesSource, scenes_source
from polysense.data.scenes.options import VARIANTS
from polysense.data.scenes.palette import COLOURS, SHAPES, heldout_pairs
from polysense.data.sources import Subset

SPECS = [f"scenes:{v}?size=32" if v else "scenes?size=32" for v in VARIANTS]


def plain(x: object) -> bytes:
    if isinstance(x, dict):
        return b"".join(plain(k) + plain(v) for k, v in sorted(x.items()))
    return x.tobytes() if isinstance(x, np.ndarray) else repr(x).encode()


def digest(spec: str, rows: list[int], split: str = "train") -> dict[int, int]:
    source = scenes_source(spec, split)
    return {i: zlib.crc32(plain(source[i])) for i in rows}


def test_the_same_in_another_process_and_in_any_order():
    here = {spec: digest(spec, [0, 5, 3, 99, 41]) for spec in SPECS}
    assert here == {spec: {i: digest(spec, [i])[i] for i in (99, 41, 0, 3, 5)} for spec in SPECS}
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_scenes_source as t; print([t.digest(s, [99, 41, 0, 3, 5]) for s in t.SPECS])"
    out = subprocess.run([sys.executable, "-c", code, __file__.rpartition("/")[0]], capture_output=True, text=True, check=True).stdout
    assert eval(out) == list(here.values())


def test_seeds_splits_and_indices_are_different_streams():
    sums = [d for extra in ("", "&seed=1", "&seed=2") for split in ("train", "val", "test")
            for d in digest("scenes?size=16&digits=0" + extra, [0, 1, 2], split).values()]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("spec", SPECS)
def test_offers_are_the_keys_produced(spec: str):
    source = scenes_source(spec)
    named = {"captions": {"text", "text_mask"}, "qa": {"question", "answer"}, "image": {"image", "views"}, "id": {"index"},
             "mask": {"mask", "polygon"}, "video": {"video", "video_mask"}}
    extra = {"instruction", "before", "after"} if "edits" in spec else set()
    for i in range(3):
        keys = set(source[i])
        assert set().union(*(named.get(k, {k}) for k in keys - extra)) == set(source.offers) and extra <= keys
    s = source[2]
    assert s["image"].shape == (32, 32, 3) and s["image"].dtype == np.uint8 and 1 <= len(s["captions"]) <= 5
    assert isinstance(s["label"], int) and 0 <= s["label"] < len(source.classes)
    assert s["captions"] == source.about(2)["captions"]
    if "boxes" in s:
        assert s["boxes"].dtype == np.float32 and s["boxes"].shape == (len(s["box_label"]), 4) and (s["boxes"][:, 2:] > s["boxes"][:, :2]).all()


def test_captions_and_labels_without_painting_are_those_of_the_samples(monkeypatch: pytest.MonkeyPatch):
    source = scenes_source("scenes:combos?n=12&size=16")
    said, labels = [c for i in range(12) for c in source[i]["captions"]], [source[i]["label"] for i in range(12)]
    fresh = scenes_source("scenes:combos?n=12&size=16")
    monkeypatch.setattr("polysense.data.scenes.source.paint", lambda *a: pytest.fail("painted"))
    assert list(fresh.captions()) == said and fresh.labels() == labels
    assert [f"a {source.classes[k]}" in " ".join(said[5 * i:5 * i + 5]) or source.classes[k].split()[1] in said[5 * i] for i, k in enumerate(labels)]


def test_a_source_is_small_to_send_and_its_copy_gives_the_same():
    source = scenes_source("scenes:clips?size=32")
    source[0]
    sent = pickle.dumps(source)
    assert len(sent) < 8000 and np.array_equal(pickle.loads(sent)[7]["video"], source[7]["video"])


def test_a_fifth_of_the_pairs_is_held_out_evenly():
    held = heldout_pairs()
    assert len(held) == len(SHAPES) * len(COLOURS) // 5 == 36
    assert {sum(c == colour for c, _ in held) for colour in COLOURS} == {3}
    assert {sum(s == shape for _, s in held) for shape in SHAPES} <= {2, 3}
    assert not held & {("red", "circle"), ("blue", "square"), ("green", "triangle"), ("yellow", "star")}, "the examples of the docs are seen"
    assert zlib.crc32(repr(sorted(held)).encode()) == HELD, "the set is fixed: published results depend on it"


HELD = 3372111800


@pytest.mark.parametrize("spec", ["scenes", "scenes:single", "scenes:combos", "scenes:edits", "scenes:clips", "scenes:sounds", "scenes:qa"])
def test_training_never_shows_a_held_out_pair(spec: str):
    source, held, seen = scenes_source(spec), heldout_pairs(), set()
    for i in range(1500 if spec in ("scenes", "scenes:combos") else 500):
        scenes = [source.scene(i)] + ([source.edit(i).scene] if "edits" in spec else [])
        seen |= {(t.colour, t.shape) for s in scenes for t in s.things}
    assert not seen & held and len({p for p in seen if p[1] in SHAPES}) > 135


def test_the_test_split_of_combos_shows_only_held_out_pairs_under_the_same_labels():
    train, test = scenes_source("scenes:combos"), scenes_source("scenes:combos", "test")
    assert train.classes == test.classes and len(train.classes) == 180
    seen = {test.classes[k] for k in (test._label(i) for i in range(400))}
    assert seen == {f"{c} {s}" for c, s in heldout_pairs()}
    every = scenes_source("scenes?combos=heldout&digits=0", "test")
    assert all((t.colour, t.shape) in heldout_pairs() for i in range(200) for t in every.scene(i).things)


def test_handwriting_of_the_splits_is_disjoint():
    rows = {s: {t.writing for i in range(400) for t in scenes_source("scenes:digits", s).scene(i).things} for s in ("train", "val", "test")}
    assert not rows["train"] & rows["val"] and not rows["train"] & rows["test"] and not rows["val"] & rows["test"]
    assert min(len(v) for v in rows.values()) > 150


def test_options():
    s = scenes_source("scenes?n=7&size=48&objects=2&shapes=circle,star&colours=4&style=plain&captions=2&hint=segments&digits=0", "dev")
    assert len(s) == 7 and s.split == "val" and s[0]["image"].shape == (48, 48, 3) and len(s[0]["captions"]) == 2
    things = [t for i in range(7) for t in s.scene(i).things]
    assert {t.shape for t in things} <= {"circle", "star"} and {t.colour for t in things} <= set(list(COLOURS)[:4])
    assert {t.texture for t in things} == {"plain"}
    assert len(scenes_source("scenes:clips?frames=5")[0]["video"]) == 5 and scenes_source("scenes:sounds?seconds=0.5")[0]["audio"].shape == (8000,)
    assert s[-1]["id"] == s[6]["id"]
    with pytest.raises(IndexError):
        s[7]


@pytest.mark.parametrize(("spec", "seen"), [
    ("scenes?sizes=large&digits=0&n=40", {"large"}), ("scenes:single?sizes=medium,small&n=40", {"small", "medium"}),
    ("scenes:digits?sizes=small&n=20", {"medium"}), ("scenes:single?n=40", {"small", "medium", "large"})])
def test_things_are_of_the_sizes_that_were_asked_for(spec: str, seen: set[str]):
    s = scenes_source(spec)
    assert {t.size for i in range(len(s)) for t in s.scene(i).things} == seen
    assert all(s.scene(i).things for i in range(len(s)))


@pytest.mark.parametrize(("spec", "split", "says"), [
    ("scenes:singel", "train", "single"), ("scenes?sise=3", "train", "size"), ("scenes?size=big", "train", "number"),
    ("scenes?size=2", "train", "8 to"),
    ("scenes?objects=0-3", "train", "1-4"), ("scenes?shapes=circel", "train", "circle"), ("scenes?combos=new", "train", "heldout"),
    ("scenes?sizes=larg", "train", "large"),
    ("scenes", "trian", "train, val"), ("scenery", "train", "scenes:single"), ("scenes:single?objects=2", "train", "fixed"),
    ("scenes?shapes=99", "train", "15"), ("scenes?shapes=circle&colours=red&combos=heldout", "test", "combos=all")])
def test_mistakes_are_answered_in_one_line(spec: str, split: str, says: str):
    with pytest.raises(UserError, match=says) as error:
        scenes_source(spec, split)
    assert "\n" not in str(error.value)


def test_counts_and_places_are_spread_out():
    source = ScenesSource("scenes")
    scenes = [source.scene(i) for i in range(400)]
    counts = np.bincount([len(s.things) for s in scenes], minlength=5)
    assert counts[1:5].min() > 60
    at = np.array([(t.x, t.y) for s in scenes for t in s.things])
    assert np.abs(at.mean(0) - 0.5).max() < 0.03 and at.std(0).min() > 0.2
    assert {len([t for t in s.things if (t.colour, t.shape) == (s.things[0].colour, s.things[0].shape)]) for s in scenes} >= {1, 2, 3, 4}


def test_a_sample_costs_less_than_a_three_hundredth_of_a_second():
    from time import process_time

    source = ScenesSource("scenes:single")
    source[0]
    best = min(_seconds(source, k, process_time) for k in range(3))
    assert best < 1 / 300, f"{1 / best:.0f} images a second"


def _seconds(source: ScenesSource, k: int, clock) -> float:
    start = clock()
    for i in range(40 * k, 40 * k + 40):
        source[i + 1]
    return (clock() - start) / 40


def test_scenes_are_sources_among_others():
    from polysense.data import list_sources, source

    listed = {s.name: s for s in list_sources()}
    assert {f"scenes:{v}".rstrip(":") for v in VARIANTS} <= set(listed)
    assert all(listed[name].offers == source(name, "val").offers for name in listed if name.startswith("scenes"))
    both = source("scenes:single?n=3&size=16+digits")
    assert both[1]["image"].shape == (16, 16, 3) and both.classes[both[1]["label"]] in SHAPES
    with pytest.raises(UserError, match="size"):
        source("scenes?siz=16")


@pytest.mark.parametrize("keys, left", [(("image", "label"), []), (("image", "text"), ["captions"]), (("image", "boxes"), ["boxes"]),
                                        (("image", "chat"), ["captions", "boxes", "qa"])], ids=lambda x: " ".join(x))
def test_what_nobody_asks_for_is_not_worked_out_and_the_rest_is_the_same(keys, left):
    """A loader that wants pictures alone pays for no captions, boxes and questions; wrapped sources pass it on."""
    whole = scenes_source("scenes?size=16&n=8")
    part = Subset(whole, [5, 2]).only(keys)
    one, all_of_it = part[0], whole[5]
    assert np.array_equal(one["image"], all_of_it["image"]) and one["label"] == all_of_it["label"]
    assert [k for k in ("captions", "boxes", "qa") if len(one.get(k, ()))] == left
    assert all(str(one[k]) == str(all_of_it[k]) for k in left)


def test_the_loader_asks_for_its_own_keys_only():
    source = scenes_source("scenes?size=16&n=8")
    asked = []
    source.only = lambda keys: asked.append(set(keys)) or ScenesSource.only(source, keys)
    batch = next(iter(Loader(source, Feed(image=ImagePlan(size=16)), None, batch_size=4, train=False, needs=("image", "label"))))
    assert asked == [{"image", "label"}] and batch["label"].tolist() == source.labels()[:4]
