"""A user's own data: folders, tables, COCO, WebDataset tars (indexed and streamed), Hugging Face data sets, whole and damaged."""
import functools
import gzip
import io
import json
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polysense.base.errors import UserError
from polysense.base.plan import Feed, ImagePlan, TextPlan
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.sources import BadSample
from polysense.data.tokenizer import make_tokenizer

FEED = Feed(image=ImagePlan(size=8), text=TextPlan(vocab=300, length=12))


def png(value: int = 0, size: tuple[int, int] = (12, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value % 256, 100, 50)).save(out, "PNG")
    return out.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def ids(s) -> set[str]:
    return {s.id(i) for i in range(len(s))}


def value(sample) -> int:
    return np.asarray(sample["image"])[0, 0, 0]


def test_folder_of_classes_with_unicode_names_and_a_held_out_tenth(tmp_path):
    for k in range(30):
        put(tmp_path / ("猫" if k % 2 else "Hund ß") / f"фото {k}.PNG", png(k))
    put(tmp_path / "猫" / "._hidden.png", b"x")
    put(tmp_path / ".thumbs" / "t.png", png())
    put(tmp_path / "猫" / "notes.md", "x")
    whole, train, val = (source(tmp_path, split) for split in ("all", "train", "val"))
    assert len(whole) == 30 and ids(train) | ids(val) == ids(whole) and not ids(train) & ids(val) and 1 <= len(val) < 10
    assert whole.classes == ("Hund ß", "猫") and set(whole.offers) == {"index", "image", "views", "label"}
    sample = whole[whole.labels().index(1)]
    assert sample["id"].startswith("猫/фото") and value(sample) == int(sample["id"].split()[1].split(".")[0])


def test_folder_with_split_folders_and_a_class_that_is_called_train(tmp_path):
    for split, kinds in (("train", "abc"), ("validation", "bc")):
        for k in kinds:
            put(tmp_path / "set" / split / k / "1.png", png())
    val = source(tmp_path / "set", "val")
    assert val.classes == ("a", "b", "c") and val.labels() == [1, 2] and len(source(tmp_path / "set")) == 3
    assert source(tmp_path / "set", "test").labels() == [1, 2] and len(source(tmp_path / "set", "all")) == 5
    put(tmp_path / "vehicles" / "train" / "1.png", png())
    put(tmp_path / "vehicles" / "bus" / "1.png", png())
    assert source(tmp_path / "vehicles", "all").classes == ("bus", "train")


def test_flat_folder_and_caption_files_beside_pictures(tmp_path):
    for k in range(3):
        put(tmp_path / "a" / f"{k}.png", png(k))
    assert set(source(tmp_path / "a", "all").offers) == {"index", "image", "views"}
    for k in range(3):
        put(tmp_path / "a" / f"{k}.txt", f"first of {k}\n第二个 {k}\n")
    s = source(tmp_path / "a", "all")
    assert "text" in s.offers and s[2]["captions"] == ["first of 2", "第二个 2"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tsv", "parquet"])
def test_metadata_in_the_folder(tmp_path, kind):
    rows = [{"file_name": f"图/{k}.png", "text": f"一张图片, {k}"} for k in range(12)]
    for k in range(12):
        put(tmp_path / f"图/{k}.png", png(k))
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    elif kind == "jsonl":
        put(tmp_path / "metadata.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    else:
        between = "," if kind == "csv" else "\t"
        lines = [f"file_name{between}text", *(f'{r["file_name"]}{between}"{r["text"]}"' for r in rows)]
        put(tmp_path / f"metadata.{kind}", "\ufeff" + "\n".join(lines))
    s = source(tmp_path, "all")
    assert len(s) == 12 and s[5]["captions"] == ["一张图片, 5"] and value(s[5]) == 5 and s[5]["id"] == "图/5.png" and "text" in s.offers
    assert len(source(tmp_path)) + len(source(tmp_path, "val")) == 12


def test_table_columns_by_option_series_lists_and_labels(tmp_path):
    put(tmp_path / "p" / "a.png", png(7))
    put(tmp_path / "t.csv", "where;headline;caption_0;caption_1;kind\na.png;H;x;y;10\na.png;G;z;;9\n")
    s = source(f"{tmp_path}/t.csv?image=where&root={tmp_path / 'p'}", "all")
    assert s[0]["captions"] == ["x", "y"] and s[1]["captions"] == ["z"] and s[1]["id"] == "a.png#2" and "label" not in s.offers
    s = source(f"{tmp_path}/t.csv?image=where&caption=headline,caption_0&label=kind&root={tmp_path / 'p'}", "all")
    assert s[0]["captions"] == ["H", "x"] and s.classes == ("9", "10") and s.labels() == [1, 0]
    put(tmp_path / "t.jsonl", json.dumps({"image": "p/a.png", "captions": ["one", "two"], "label": "dog", "question": "q", "answer": 3}))
    s = source(tmp_path / "t.jsonl", "all")
    assert s[0]["captions"] == ["one", "two"] and s.classes == ("dog",) and s[0]["answer"] == "3" and {"question", "answer"} <= set(s.offers)
    for spec, why in (("t.csv", "no column for the pictures"), ("t.csv?image=nix", r"no column 'nix'.*where"),
                      ("t.csv?image=where&foo=1", "unknown option 'foo'"), ("t.csv?image=where&caption", "cannot read the option")):
        with pytest.raises(UserError, match=why):
            source(f"{tmp_path}/{spec}")


def test_split_column(tmp_path):
    put(tmp_path / "a.png", png())
    put(tmp_path / "t.csv", "image,text,split\n" + "\n".join(f"a.png,t{k},{'validation' if k == 4 else 'train'}" for k in range(6)))
    path = tmp_path / "t.csv"
    assert len(source(path)) == 5 and source(path, "val")[0]["captions"] == ["t4"] and len(source(path, "all")) == 6


def test_damage_in_a_users_folder_is_skipped_counted_and_reported(tmp_path):
    for k in range(20):
        put(tmp_path / f"{k:02d}.png", png(k))
    put(tmp_path / "03.png", b"")
    put(tmp_path / "05.png", "text, not a picture")
    put(tmp_path / "07.png", png(7)[:40])
    rows = "\n".join(f"{k:02d}.png,caption {k}" for k in range(21)) + "\n,no picture\n"                   # 20.png does not exist
    put(tmp_path / "metadata.csv", "image,text\n" + rows)
    s = source(tmp_path, "all")
    assert len(s) == 21
    with pytest.raises(BadSample):
        s[3]
    loader = Loader(s, FEED, make_tokenizer(FEED.text, s.captions()), batch_size=7)
    batches = [b for b, _ in zip(loader, range(3))]
    assert {n for n, _ in loader.skipped} == {"03.png", "05.png", "07.png", "20.png", "metadata.csv: row 22"}
    assert not {3, 5, 7, 20} & set(torch.cat([b["index"] for b in batches]).tolist()) and all(torch.isfinite(b["image"]).all() for b in batches)


@pytest.mark.parametrize(("make", "why"), [
    (lambda p: None, "no pictures in"), (lambda p: put(p / "a.txt", "x"), "no pictures in"),
    (lambda p: put(p / "metadata.csv", "image,text\n"), "has no rows"), (lambda p: put(p / "metadata.jsonl", "{broken\n"), "has no rows.*not JSON")])
def test_empty_folders_are_refused(tmp_path, make, why):
    make(tmp_path)
    with pytest.raises(UserError, match=why):
        source(tmp_path)


def test_paths_that_are_no_data_are_refused(tmp_path):
    put(tmp_path / "x.zip", "x")
    put(tmp_path / "x.json", "[1]")
    put(tmp_path / "y.json", "{")
    put(tmp_path / "x.tar", b"not a tar at all")
    put(tmp_path / "x.parquet", b"PAR?")
    for name, why in (("x.zip", "cannot read"), ("x.json", "not a COCO file"), ("y.json", "is not JSON"),
                      ("x.tar", "holds no samples.*cannot be read"), ("x.parquet", "cannot read"), ("none.tar", "no file"), ("none/", "no such file"),
                      ("*.tar.gz", "no tars match")):
        with pytest.raises(UserError, match=why):
            source(f"{tmp_path}/{name}")
    with pytest.raises(UserError, match="shell commands"):
        source("pipe:cat x.tar")


def coco(tmp_path: Path) -> Path:
    for k in range(4):
        put(tmp_path / "images" / f"{k}.png", png(k, (40, 20)))
    outline = [[10, 5, 30, 5, 30, 15, 10, 15]]
    boxes = [{"id": k, "image_id": k, "category_id": 7 if k % 2 else 3, "bbox": [10, 5, 20, 10], "segmentation": outline if k else []}
             for k in range(4)]
    said = [{"id": 10, "image_id": 1, "caption": "a red box "}, {"id": 11, "image_id": 1, "caption": "again"}]
    plain = {"images": [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 20} for k in range(4)], "annotations": boxes + said,
             "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]}
    return put(tmp_path / "instances_train.json", json.dumps(plain))


def test_coco_annotations(tmp_path):
    path = coco(tmp_path)
    s = source(path, "all")
    assert set(s.offers) == {"index", "image", "views", "boxes", "box_label", "tags"} and s.classes == ("cat", "dog") and len(s) == 4
    assert s[1]["boxes"].tolist() == [[0.25, 0.25, 0.75, 0.75]] and s[1]["box_label"] == [1] and s[1]["tags"] == [1]
    with_masks = source(f"{path}?only=mask", "all")
    assert len(with_masks) == 3 and with_masks[0]["mask"].shape == (1, 20, 40) and with_masks[0]["mask"][0, 6:14, 11:29].all()
    with_text = source(f"{path}?only=text&images=images", "all")
    assert len(with_text) == 1 and with_text[0]["captions"] == ["a red box", "again"]
    with pytest.raises(UserError, match="no pictures at"):
        source(f"{path}?images=elsewhere")


def tar(path: Path, n: int, first: int = 0, broken: tuple[int, ...] = (), gz: bool = False) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for k in range(first, first + n):
            for ending, data in (("png", b"?" if k in broken else png(k)), ("txt", f"caption {k}".encode()), ("cls", b"%d" % (k % 3))):
                info = tarfile.TarInfo(f"s{k:03d}.{ending}")
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return put(path, gzip.compress(out.getvalue()) if gz else out.getvalue())


@pytest.mark.parametrize("gz", [False, True])
def test_local_tars_are_indexed(tmp_path, gz):
    ending = "tar.gz" if gz else "tar"
    for k in range(3):
        tar(tmp_path / f"shard-{k:03d}.{ending}", 5, 5 * k, gz=gz)
    for pattern in ("shard-{000..002}", "shard-*", "shard-00?"):
        s = source(f"{tmp_path}/{pattern}.{ending}", "all")
        assert len(s) == 15 and s[7]["captions"] == ["caption 7"] and value(s[7]) == 7 and s[7]["label"] == 1
        assert {"image", "text", "label"} <= set(s.offers)
    assert len(source(tmp_path, "all")) == 15, "a folder of tars"
    assert len(source(f"{tmp_path}/shard-000.{ending}", "all")) == 5


def test_a_tar_that_breaks_off_keeps_what_can_be_read(tmp_path):
    for gz in (False, True):
        path = tar(tmp_path / ("a.tar.gz" if gz else "a.tar"), 40, gz=gz)
        path.write_bytes(path.read_bytes()[:-(600 if gz else 30000)])
        s = source(path, "all")
        assert 3 < len(s) < 40 and s.notes and "a.tar" in s.notes[0][0] and s[0]["captions"] == ["caption 0"]
        assert Loader(s, FEED, batch_size=2, needs=("image",)).skipped == list(s.notes)


@pytest.fixture
def shards(tmp_path):
    for k in range(4):
        tar(tmp_path / f"{k}.tar", 10, 10 * k, broken=(12,))
    return f"{tmp_path}/{{0..3}}.tar?stream=1"


def take(loader, n):
    return [b for b, _ in zip(loader, range(n))]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a[k], b[k]) for a, b in zip(one, two) for k in a)


def pixel(batch) -> list[int]:
    """Which samples a batch holds, read from the colour of its pictures."""
    red = batch["image"][:, 0, 4, 4] * FEED.image.std[0] + FEED.image.mean[0]
    return (red * 255).round().int().tolist()


def test_a_stream_shows_everything_once_an_epoch_and_resumes_in_the_middle(shards):
    s = source(shards)
    tokenizer = make_tokenizer(FEED.text, s.captions())
    assert not hasattr(s, "__len__") and {"image", "text", "label"} <= set(s.offers)
    loader = Loader(s, FEED, tokenizer, batch_size=8, seed=1)
    whole = take(loader, 12)
    seen = [p for b in whole[:5] for p in pixel(b)]
    assert len(set(seen)) == 39 and 12 not in seen and seen != sorted(seen) and sorted(seen[:16]) != list(range(16))
    assert seen != [p for b in whole[5:10] for p in pixel(b)] and loader.skipped == [("s012", loader.skipped[0][1])]
    said = [tokenizer.decode(t).replace(" ", "") for t in whole[0]["text"]]
    assert said == [f"caption{p}" for p in pixel(whole[0])] and whole[0]["label"].tolist() == [p % 3 for p in pixel(whole[0])]
    first = Loader(s, FEED, tokenizer, batch_size=8, seed=1)
    take(first, 6)
    state = json.loads(json.dumps(first.state()))
    assert state["step"] == 7 and state["epoch"] == 1 and same(take(Loader(s, FEED, tokenizer, batch_size=8, seed=1, state=state), 5), whole[7:])
    assert same(take(Loader(s, FEED, tokenizer, batch_size=8, seed=1, workers=2), 7), whole[:7])
    assert first.names(whole[0]["index"][:1])[0].startswith("s0")


def test_a_stream_is_dealt_out_to_the_ranks(shards):
    s = source(shards)
    for world in (2, 8):                                                   # whole shards; or, with too few of them, every eighth sample
        loaders = [Loader(s, FEED, batch_size=world * 4, train=False, rank=r, world=world, needs=("image",)) for r in range(world)]
        seen = [{p for b in loader for p in pixel(b)} for loader in loaders]
        assert set().union(*seen) == set(range(40)) - {12} and sum(map(len, seen)) == 39
    once = list(Loader(s, FEED, batch_size=16, train=False, needs=("image",)))
    assert [p for b in once for p in pixel(b)] == [k for k in range(40) if k != 12]


def test_a_stream_from_an_address_with_a_missing_and_a_broken_shard(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *a): ...

    for k in range(3):
        tar(tmp_path / f"{k}.tar", 30, 30 * k)
    broken = tmp_path / "1.tar"
    broken.write_bytes(broken.read_bytes()[:20000])
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        s = source(f"{base}/{{0..3}}.tar")
        loader = Loader(s, FEED, batch_size=10, train=False, needs=("image",))
        seen = {p for b in loader for p in pixel(b)}
        assert seen >= set(range(30)) | set(range(60, 90)) and 0 < len(seen - set(range(30)) - set(range(60, 90))) < 30
        assert {n.rsplit("/", 1)[1] for n, _ in loader.skipped} == {"1.tar", "3.tar"}
        with pytest.raises(UserError, match=r"holds no samples.*404"):
            source(f"{base}/none.tar")
    finally:
        server.shutdown()


def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(k) if k != 4 else b"broken", "path": None} for k in range(20)], "text": [f"字幕 {k}" for k in range(20)],
            "label": [k % 2 for k in range(20)]}
    kinds = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "label": kinds})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    s = source(f"hf:{tmp_path / 'one'}", "all")
    assert len(s) == 20 and s[7]["captions"] == ["字幕 7"] and value(s[7]) == 7 and s.classes == ("cat", "dog") and s[7]["label"] == 1
    with pytest.raises(BadSample):
        s[4]
    assert len(source(f"hf:{tmp_path / 'one'}")) < 20 and s.about(4)["captions"] == ["字幕 4"]
    datasets.DatasetDict({"train": data, "validation": data.select(range(5))}).save_to_disk(tmp_path / "two")
    assert len(source(f"hf:{tmp_path / 'two'}?caption=text", "test")) == 5 and len(source(f"hf:{tmp_path / 'two'}")) == 20
    with pytest.raises(UserError, match="no column 'nix'"):
        source(f"hf:{tmp_path / 'two'}?caption=nix")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot open the Hugging Face data set"):
        source(f"hf:{tmp_path / 'empty'}")
