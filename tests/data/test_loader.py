"""The loader: what a batch holds, that it depends on seed and step alone, resuming, damage, and what belongs to a picture pixel by pixel."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polysense.base.batch import check_batch
from polysense.base.errors import UserError
from polysense.base.plan import Feed, ImagePlan, TextPlan, ViewPlan
from polysense.data.images import read_images
from polysense.data.loader import Loader, check_needs
from polysense.data.sources import BadSample, ListSource
from polysense.data.tokenizer import make_tokenizer

VIEW = ViewPlan(size=12, scale=(0.3, 1.0), flip=0.5, jitter=0.5, blur=0.3)
FEED = Feed(image=ImagePlan(size=16), train_image=ViewPlan(size=16, scale=(0.5, 1.0), flip=0.5), views=(VIEW, VIEW),
            text=TextPlan(vocab=200, length=10))
N = 37


def jpeg(i: int, size: tuple[int, int] = (40, 30)) -> bytes:
    rng, out = np.random.default_rng(i), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def samples(n: int = N) -> list[dict]:
    words = ("red", "green", "blue")
    said = [[f"a {words[i % 3]} thing", f"letter {chr(97 + i % 26)}", f"{words[i % 3]} 东西"] for i in range(n)]
    return [{"id": f"照片 {i}", "image": jpeg(i, (20 + i, 50 - i)), "captions": said[i], "label": i % 3} for i in range(n)]


@pytest.fixture(scope="module")
def source() -> ListSource:
    return ListSource("toy", samples(), ("image", "text", "label"), classes=("red", "green", "blue"))


@pytest.fixture(scope="module")
def tokenizer(source):
    return make_tokenizer(FEED.text, source.captions())


def take(loader: Loader, n: int) -> list[dict]:
    return [b for b, _ in zip(loader, range(n))]


def same(one: list[dict], two: list[dict]) -> bool:
    return len(one) == len(two) and all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, two))


def test_training_batch_holds_what_feed_and_source_allow(source, tokenizer):
    (batch,) = take(Loader(source, FEED, tokenizer, batch_size=8), 1)
    check_batch(batch, ("image", "views", "text", "text_mask", "label", "index"))
    assert set(batch) == {"image", "views", "text", "text_mask", "label", "index"}
    assert batch["image"].shape == (8, 3, 16, 16) and batch["views"].shape == (8, 2, 3, 12, 12)
    assert (batch["views"][:, 0] - batch["views"][:, 1]).abs().amax((1, 2, 3)).min() > 0.1
    for k, i in enumerate(batch["index"].tolist()):
        assert batch["label"][k] == i % 3 and tokenizer.decode(batch["text"][k]) in source[i]["captions"]
    assert torch.equal(batch["text_mask"].sum(1), (batch["text"] != tokenizer.pad).sum(1) + 1) and batch["text_mask"].any(0).all()


def test_needs_limit_the_keys(source, tokenizer):
    assert set(take(Loader(source, FEED, tokenizer, batch_size=4, needs=("image", "audio|text")), 1)[0]) == {"index", "image", "text"}
    assert set(take(Loader(source, FEED, batch_size=4), 1)[0]) == {"index", "image", "views", "label"}                 # without a tokenizer no text


def test_evaluation_is_one_pass_in_order_read_exactly(source, tokenizer):
    loader = Loader(source, FEED, tokenizer, batch_size=8, train=False, needs=("image", "text"))
    batches = list(loader)
    assert len(batches) == len(loader) == 5 and [len(b["index"]) for b in batches] == [8, 8, 8, 8, 5]
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(N))
    assert torch.equal(torch.cat([b["image"] for b in batches]), read_images(FEED.image, [source[i]["image"] for i in range(N)]))
    assert tokenizer.decode(batches[1]["text"][0]) == source[8]["captions"][0] and same(batches, list(loader))          # a second pass is the same


def test_every_epoch_shows_every_sample_once_and_batches_cross_borders(source, tokenizer):
    loader = Loader(source, FEED, tokenizer, batch_size=8, needs=("label",))
    seen = torch.cat([b["index"] for b in take(loader, 14)]).tolist()
    first, second, third = seen[:N], seen[N:2 * N], seen[2 * N:3 * N]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(N)) and first != second != third
    assert first != torch.cat([b["index"] for b in take(Loader(source, FEED, tokenizer, batch_size=8, needs=("label",), seed=1), 5)]).tolist()[:N]


def test_captions_vary_from_epoch_to_epoch(source, tokenizer):
    loader = Loader(source, FEED, tokenizer, batch_size=N, needs=("text",))
    said = [{int(i): tokenizer.decode(t) for i, t in zip(b["index"], b["text"])} for b in take(loader, 12)]
    assert sum(len({epoch[i] for epoch in said}) == 3 for i in range(N)) > 0.8 * N


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), world=st.sampled_from([2, 3, 4]), start=st.integers(0, 9), train=st.booleans())
def test_ranks_share_one_global_batch(source, tokenizer, seed, world, start, train):
    how = {"batch_size": 12, "seed": seed, "train": train, "prefetch": 0}
    at = {"step": start if train else 0, "source": "toy", "length": N, "batch_size": 12, "seed": seed}
    whole = take(Loader(source, FEED, tokenizer, **how, state=at), 2)
    parts = [take(Loader(source, FEED, tokenizer, **how, state=at, rank=r, world=world), 2) for r in range(world)]
    for k, batch in enumerate(whole):
        for key in batch:
            if key in ("text", "text_mask"):                               # each rank trims to its own longest caption
                fill = tokenizer.pad if key == "text" else False
                joined = torch.cat([torch.nn.functional.pad(p[k][key], (0, batch[key].shape[1] - p[k][key].shape[1]), value=fill) for p in parts])
            else:
                joined = torch.cat([p[k][key] for p in parts])
            assert torch.equal(joined, batch[key]), key


def test_threads_processes_cache_and_prefetch_give_the_same_bits(source, tokenizer):
    ways = ({"workers": 0, "prefetch": 0}, {"workers": 0, "prefetch": 3}, {"workers": 2}, {"workers": 0, "cache_bytes": 0},
            {"workers": 1, "prefetch": 1})
    first, *others = (take(Loader(source, FEED, tokenizer, batch_size=8, seed=5, **way), 8) for way in ways)
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_bit_exactly_in_mid_epoch(source, tokenizer, workers):
    whole = take(Loader(source, FEED, tokenizer, batch_size=8, seed=2), 12)
    loader = Loader(source, FEED, tokenizer, batch_size=8, seed=2, workers=workers)
    first = take(loader, 7)
    state = json.loads(json.dumps(loader.state()))
    # zip took an eighth batch before it saw the end of range: the position counts what was handed out
    assert state["step"] == 8
    assert same(first, whole[:7]) and same(take(Loader(source, FEED, tokenizer, batch_size=8, seed=2, workers=workers, state=state), 4), whole[8:])
    assert same(take(Loader(source, FEED, tokenizer, batch_size=8, seed=2, state=state | {"step": 0}), 2), whole[:2])


def test_iterating_again_goes_on_in_training(source, tokenizer):
    loader, whole = Loader(source, FEED, tokenizer, batch_size=8), take(Loader(source, FEED, tokenizer, batch_size=8), 6)
    got = [next(iter(loader)) for _ in range(3)]
    assert same(got, whole[:3])


def test_state_of_other_data_is_refused(source, tokenizer):
    state = Loader(source, FEED, tokenizer, batch_size=8).state()
    for change in ({"batch_size": 4}, {"seed": 3}):
        with pytest.raises(UserError, match="the saved position is for"):
            Loader(source, FEED, tokenizer, **({"batch_size": 8} | change), state=state)
    with pytest.raises(UserError, match="length"):
        Loader(ListSource("toy", samples(5), source.offers), FEED, tokenizer, batch_size=8, state=state)


def test_what_cannot_work_is_refused_before_the_first_batch(source, tokenizer):
    with pytest.raises(UserError, match=r"toy offers no boxes.*bccd"):
        Loader(source, FEED, tokenizer, batch_size=4, needs=("image", "boxes"))
    with pytest.raises(UserError, match="offers no audio or depth"):
        check_needs(("audio|depth",), source.offers)
    with pytest.raises(UserError, match="feed does not say how to read text"):
        Loader(source, Feed(image=FEED.image), tokenizer, batch_size=4, needs=("text",))
    with pytest.raises(UserError, match="without a tokenizer"):
        Loader(source, FEED, batch_size=4, needs=("text",))
    with pytest.raises(UserError, match="multiple of 3"):
        Loader(source, FEED, tokenizer, batch_size=4, world=3)
    with pytest.raises(UserError, match="has no samples"):
        Loader(ListSource("none", [], ("image",)), FEED, batch_size=4)
    assert check_needs(("image", "text|audio"), source.offers, FEED) == ("image", "text")


BAD = {3: b"", 7: b"this is no picture", 11: jpeg(11)[:200], 20: Path("gone.jpg")}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_replaced_counted_and_reported(tokenizer, workers):
    broken = [s | {"image": BAD.get(i, s["image"])} for i, s in enumerate(samples())]
    broken[30] = broken[30] | {"captions": []}
    source = ListSource("broken", broken, ("image", "text", "label"))
    with pytest.raises(BadSample, match="照片 3"):
        source[3]
    loader = Loader(source, FEED, tokenizer, batch_size=8, workers=workers)
    seen = torch.cat([b["index"] for b in take(loader, 5)])
    assert sorted(n for n, _ in loader.skipped) == sorted(f"照片 {i}" for i in (*BAD, 30)) and all(why for _, why in loader.skipped)
    assert dict(loader.skipped)["照片 30"] == "has no caption" and dict(loader.skipped)["照片 3"] == "the file is empty"
    whole = torch.cat([b["index"] for b in take(Loader(ListSource("broken", samples(), source.offers), FEED, tokenizer, batch_size=8), 5)])
    stands_in = {i: i + 1 for i in (*BAD, 30)}
    assert seen.tolist() == [stands_in.get(i, i) for i in whole.tolist()]
    exam = Loader(source, FEED, tokenizer, batch_size=8, train=False, workers=workers)
    assert torch.cat([b["index"] for b in exam]).tolist() == [i for i in range(N) if i not in stands_in] and len(exam.skipped) == 5


@pytest.mark.parametrize("train", [True, False])
def test_mostly_unreadable_data_stops_with_the_reason(tokenizer, train):
    broken = [s | {"image": b"" if i % 3 else s["image"]} for i, s in enumerate(samples())]
    with pytest.raises(UserError, match=r"more than half of the samples of broken cannot be read.*the file is empty"):
        list(zip(Loader(ListSource("broken", broken, ("image",)), FEED, batch_size=8, train=train), range(20)))
    with pytest.raises(UserError, match="can be read"):
        take(Loader(ListSource("gone", [{"id": str(i), "image": b""} for i in range(9)], ("image",)), FEED, batch_size=4, workers=2), 3)


def test_a_run_of_damage_in_a_good_source_is_no_reason_to_stop(tokenizer):
    broken = [s | {"image": b"" if 4 <= i < 14 else s["image"]} for i, s in enumerate(samples())]
    for train in (True, False):
        loader = Loader(ListSource("broken", broken, ("image",)), FEED, batch_size=2, train=train)
        assert len(take(loader, 18)) >= 13 and len(loader.skipped) == 10


def test_names_for_messages(source, tokenizer):
    assert Loader(source, FEED, tokenizer, batch_size=4).names(torch.tensor([2, 5])) == ["照片 2", "照片 5"]


def test_samples_of_any_object_with_the_three_attributes():
    class Bare:
        name, offers = "bare", ("image", "label")

        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {"id": f"b{i}", "image": np.full((20, 20, 3), 40 * i, np.uint8), "label": i}

    feed = Feed(image=ImagePlan(size=8, mean=(0.0,) * 3, std=(1.0,) * 3))
    (batch,) = Loader(Bare(), feed, batch_size=6, train=False)
    assert torch.allclose(batch["image"].mean((1, 2, 3)), torch.arange(6) * 40 / 255) and batch["label"].tolist() == list(range(6))


def framed(train_image: ViewPlan | None) -> Feed:
    return Feed(image=ImagePlan(size=32, fit="squash", mean=(0.0,) * 3, std=(1.0,) * 3), train_image=train_image)


@pytest.mark.parametrize("plan", [None, ViewPlan(size=32, scale=(0.3, 0.7), flip=0.5)], ids=["exact", "view"])
def test_boxes_masks_depth_and_hints_follow_the_picture(plan):
    """Each sample is one bright square on black; wherever the crop puts it, everything else must lie there too."""
    rng, items = np.random.default_rng(0), []
    for i in range(24):
        w, h = rng.integers(50, 120, 2)
        x, y = rng.integers(5, w - 35), rng.integers(5, h - 35)
        image, mask = np.zeros((h, w, 3), np.uint8), np.zeros((2, h, w), bool)
        image[y:y + 30, x:x + 30], mask[1, y:y + 30, x:x + 30] = 255, True
        box = [[0, 0, 0.02, 0.02], [x / w, y / h, (x + 30) / w, (y + 30) / h]][: 2 if i % 2 else None]
        items.append({"id": str(i), "image": image, "mask": mask, "depth": mask[1].astype(np.float32), "hint": image, "edited": 255 - image,
                      "boxes": np.asarray(box, np.float32), "box_label": [4, 5]})
    source = ListSource("squares", items, ("image", "mask", "depth", "hint", "edited", "boxes", "box_label"))
    batch = take(Loader(source, framed(plan), batch_size=24), 1)[0]
    check_batch(batch, ("image", "mask", "depth", "hint", "edited", "boxes", "box_label"))
    bright = batch["image"].mean(1) > 0.5
    assert batch["mask"].shape == (24, 2, 32, 32) and bright.float().mean() > 0.05
    for near in (batch["mask"][:, 1], batch["depth"][:, 0] > 0.5, batch["hint"].mean(1) > 0.5, batch["edited"].mean(1) < 0.5):
        assert (near != bright).float().mean() < 0.02
    found = 0
    for b in range(24):
        (box,), label = batch["boxes"][b, 1:], batch["box_label"][b]
        if label[1] < 0:
            assert (box == -1).all() and bright[b].float().mean() < 0.1
            continue
        found += 1
        rows, columns = bright[b].any(1).nonzero()[:, 0], bright[b].any(0).nonzero()[:, 0]
        want = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 32
        assert (box - want).abs().max() < 0.05
    assert found > 15


def test_questions_tags_sound_and_video():
    rng = np.random.default_rng(0)
    items = [{"id": str(i), "audio": np.full(5 + i, 0.5, np.float32), "video": rng.integers(0, 256, (10 + i, 20, 30, 3), dtype=np.uint8),
              "tags": [i % 3, 2], "qa": [("what is it", "a thing"), ("how many", str(i))]} for i in range(4)]
    source = ListSource("media", items, ("audio", "video", "tags", "question", "answer"), tag_names=("a", "b", "c"))
    feed = Feed(image=ImagePlan(size=8), text=TextPlan(vocab=100, length=20))
    tokenizer = make_tokenizer(feed.text, ["what is it", "a thing", "how many 0123"] * 3)
    (batch,) = Loader(source, feed, tokenizer, batch_size=4, train=False)
    check_batch(batch, ("audio", "video", "tags", "question", "answer"))
    assert batch["audio"].shape == (4, 8) and (batch["audio"].sum(1) == 0.5 * (5 + torch.arange(4))).all()
    assert batch["video"].shape == (4, 8, 3, 8, 8) and torch.equal(batch["video"][0, -1], read_images(feed.image, [items[0]["video"][-1]])[0])
    assert batch["tags"].tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1]] and tokenizer.decode(batch["answer"][0]) == "a thing"
    asked = {tokenizer.decode(q) for b in take(Loader(source, feed, tokenizer, batch_size=4, needs=("question",)), 6) for q in b["question"]}
    assert asked == {"what is it", "how many"}
