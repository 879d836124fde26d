import multiprocessing
import os
import shutil
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from churn import churn
from colours import RGB, paint, pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polysense.app.files import find_photos
from polysense.app.index import NAME, Index, open_index
from polysense.base.errors import UserError

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture
def eye():
    return pipeline()


@pytest.fixture
def photos(tmp_path):
    for i in range(8):
        paint(tmp_path / "photos" / f"d{i % 3}" / f"{i}-{COLOURS[i % 4]}.png", COLOURS[i % 4], salt=i)
    return tmp_path / "photos"


def found(index, eye, text, k=2):
    return [Path(f.path).name for f in index.search(eye.encode(texts=[text])[0], k)]


def agrees(index, eye):
    """What the index holds is what encoding its files gives, and FAISS answers from exactly that."""
    paths = index.paths()
    if not paths:
        return
    vectors = eye.encode(images=paths)
    got = index.search(vectors, len(paths))
    want = vectors @ vectors.T
    for row, scores in zip(got, want, strict=True):
        assert sorted(f.path for f in row) == paths
        assert all(abs(f.score - scores[paths.index(f.path)]) < 1e-5 for f in row)
        assert [f.score for f in row] == sorted((f.score for f in row), reverse=True)


def test_red_finds_red_and_the_index_outlives_the_process(photos, eye):
    told = []
    with open_index(photos / NAME, eye) as index:
        report = index.update(photos, eye, batch_size=3, progress=lambda *p: told.append(p))
        assert (report.added, report.changed, report.removed, report.unchanged, report.skipped) == (8, 0, 0, 0, [])
        assert told[0] == (0, 8) and told[-1] == (8, 8) and told == sorted(told)
    with Index.open(photos / NAME) as index:
        for colour in COLOURS:
            assert all(colour in name for name in found(index, eye, f"a {colour} thing"))
        agrees(index, eye)
        assert index.update(photos, eye).unchanged == 8


def test_new_changed_removed_touched_and_copied(photos, eye):
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
        paint(photos / "d0" / "0-red.png", "blue", salt=77)
        os.utime(photos / "d1" / "1-green.png", (1, 1))
        (photos / "d2" / "2-blue.png").unlink()
        paint(photos / "new" / "n.png", "magenta")
        shutil.copy(photos / "d0" / "3-yellow.png", photos / "new" / "again.png")
        seen = []
        eye.encode_prepared = lambda batch, f=eye.encode_prepared: seen.append(len(batch)) or f(batch)
        report = index.update(photos, eye)
        assert (report.added, report.changed, report.removed, report.unchanged, report.copied) == (2, 1, 1, 6, 1)
        assert sum(seen) == 2, "the touched and the copied picture need no encoding"
        assert found(index, eye, "magenta", 1) == ["n.png"] and "2-blue.png" not in found(index, eye, "blue", 9)
        assert "0-red.png" in found(index, eye, "blue", 2)
        agrees(index, eye)


def test_removing_pictures_and_folders(photos, eye):
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
        assert index.remove([photos / "d0", photos / "d1" / "1-green.png", photos / "never.png"]) == 4
        assert len(index) == 4 and all("d0" not in p for p in index.paths())
        agrees(index, eye)
        assert index.update(photos, eye).added == 4


def test_damaged_files_are_skipped_counted_and_tried_again_when_mended(photos, eye):
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture at all")
    whole = paint(photos / "d0" / "cut.png", "red", (400, 300)).read_bytes()
    (photos / "d0" / "cut.png").write_bytes(whole[:len(whole) // 2])
    (photos / "empty.png").touch()
    (photos / "notes.txt").write_text("not a picture")
    with open_index(photos / NAME, eye) as index:
        report = index.update(photos, eye)
        assert report.added == 8 and len(report.skipped) == 3 and all(reason for _, reason in report.skipped)
        assert index.update(photos, eye).skipped == report.skipped == index.skipped()
        paint(photos / "torn.jpg", "red")
        (photos / "d1" / "1-green.png").write_bytes(b"ruined")
        report = index.update(photos, eye)
        assert (report.added, report.removed, len(report.skipped), len(index)) == (1, 1, 3, 8)
        assert report.to_json()["skipped"][0].keys() == {"path", "reason"}


def test_another_model_is_refused(photos, eye):
    other = pipeline(gain=0.5)
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
        for act in (lambda: index.update(photos, other), lambda: index.check(other), lambda: open_index(photos / NAME, other)):
            with pytest.raises(UserError, match=rf"made with model {eye.digest}.*another folder"):
                act()
        assert len(index) == 8


def test_unicode_hidden_links_and_loops(tmp_path, eye):
    photos = tmp_path / "фото 写真"
    names = ["été/Ä ö.png", "写真/赤 '\"%_#?.png", "a" * 100 + "/" + "b" * 100 + ".PNG"]
    for i, name in enumerate(names):
        paint(photos / name, "red", salt=i)
    raw = os.path.join(os.fsencode(photos), b"latin-\xe9.png")
    shutil.copy(photos / names[0], raw)
    paint(photos / ".hidden" / "h.png", "red")
    paint(photos / ".hidden.png", "red")
    paint(tmp_path / "album" / "linked.png", "blue")
    (photos / "loop").symlink_to(photos)
    (photos / "été" / "up").symlink_to("..")
    (photos / "album").symlink_to(tmp_path / "album")
    (photos / "dead.png").symlink_to("nowhere.png")
    (photos / "folder.png").mkdir()
    with open_index(photos / NAME, eye) as index:
        assert index.update(photos, eye).added == 5
        assert found(index, eye, "blue", 1) == ["linked.png"]
        assert os.fsdecode(raw) in index.paths()
        assert index.update(photos, eye).unchanged == 5
    moved = photos.rename(tmp_path / "elsewhere")
    with open_index(moved / NAME, eye) as index:
        report = index.update(moved, eye)
        assert (report.unchanged, report.added, report.removed) == (5, 0, 0), "photos and index can be moved together"


def test_several_folders_in_one_index(photos, tmp_path, eye):
    paint(tmp_path / "more" / "m.png", "magenta")
    with open_index(tmp_path / "index", eye) as index:
        index.update(photos, eye)
        assert index.update(tmp_path / "more", eye).removed == 0 and len(index) == 9
        shutil.rmtree(photos / "d0")
        assert index.update(tmp_path / "more", eye).removed == 0
        assert index.update(photos, eye).removed == 3 and found(index, eye, "magenta", 1) == ["m.png"]


def test_empty_folder_wrong_queries_and_too_many_wanted(tmp_path, eye):
    (tmp_path / "photos").mkdir()
    with open_index(tmp_path / "photos" / NAME, eye) as index:
        assert index.update(tmp_path / "photos", eye).added == 0 and index.search(eye.encode(texts=["red"])[0], 5) == []
        paint(tmp_path / "photos" / "one.png", "red")
        index.update(tmp_path / "photos", eye)
        assert len(index.search(eye.encode(texts=["red"])[0], 1000)) == 1
        with pytest.raises(UserError, match="at least one"):
            index.search(eye.encode(texts=["red"])[0], 0)
        with pytest.raises(UserError, match="width 4"):
            index.search(np.zeros(7, np.float32), 1)
        with pytest.raises(UserError, match="no folder"):
            index.update(tmp_path / "nowhere", eye)
    with pytest.raises(UserError, match="polysense index"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already"):
        Index.create(tmp_path / "photos" / NAME, eye.digest, 4)


@pytest.mark.parametrize("damage", ["head", "middle", "truncated", "other"])
def test_a_damaged_database_is_told_with_advice(photos, eye, damage):
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
    file = photos / NAME / "photos.sqlite"
    data = bytearray(file.read_bytes())
    if damage == "other":
        file.unlink()
        sqlite3.connect(file).execute("create table other(x)")
    else:
        noise = np.random.default_rng(0).bytes(len(data) - 4096)
        file.write_bytes(bytes({"head": b"garbage!" * 100 + data[800:], "middle": data[:4096] + noise, "truncated": data[:5000]}[damage]))
    with pytest.raises(UserError, match=r"is damaged.*delete the folder .* and index the pictures again"), Index.open(photos / NAME) as index:
        index.update(photos, eye)
        index.search(eye.encode(texts=["red"])[0], 3)


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "foreign"])
def test_a_damaged_snapshot_heals(photos, tmp_path, eye, damage):
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
    file = photos / NAME / "vectors.faiss"
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 255
    if damage == "foreign":
        with open_index(tmp_path / "other", eye) as other:
            other.update(photos / "d0", eye)
        data = bytearray((tmp_path / "other" / "vectors.faiss").read_bytes())
    file.unlink() if damage == "missing" else file.write_bytes(data[:100] if damage == "truncated" else data)
    with Index.open(photos / NAME) as index:
        agrees(index, eye)
        assert len(index) == 8


def test_one_writer_and_readers_that_notice(photos, eye):
    with open_index(photos / NAME, eye) as writer, Index.open(photos / NAME) as reader:
        writer.update(photos, eye)
        assert "red" in found(reader, eye, "red", 1)[0]
        writer.begin()
        with pytest.raises(UserError, match="another process is writing"):
            reader.update(photos, eye)
        assert len(found(reader, eye, "red", 3)) == 3
        writer.end()
        paint(photos / "new.png", "magenta")
        writer.update(photos, eye)
        assert found(reader, eye, "magenta", 1) == ["new.png"]
        writer.remove([photos / "new.png"])
        assert found(reader, eye, "magenta", 1) != ["new.png"]


def test_many_pictures_switch_to_cells_and_back(tmp_path, eye):
    from polysense.app.photos import Row
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    vectors = (centres[rng.integers(0, 20, 3000)] + 0.2 * rng.normal(size=(3000, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [Row(f"{i}.png", 1, 1, i.to_bytes(16, "big")) for i in range(3000)]
    with Index.create(tmp_path / "index", "d", 16, exact=1000) as index:
        index.begin()
        index.put(rows, vectors)
        index.end()
        assert "IVF" in type(index.faiss).__name__
        recall = [len({f.path for f in got} & {index.path(f"{i}.png") for i in np.argsort(-vectors @ q)[:10]}) / 10
                  for q, got in zip(vectors[:100], index.search(vectors[:100], 10), strict=True)]
        assert np.mean(recall) > 0.9
    with Index.open(tmp_path / "index", exact=1000) as index:
        index.begin()
        index.drop([f"{i}.png" for i in range(500)])
        index.put([Row("x.png", 1, 1, b"x")], vectors[:1])
        index.end()
        assert "IVF" in type(index.faiss).__name__ and index.faiss.ntotal == 2501
        assert Path(index.search(vectors[0], 1)[0].path).name == "x.png"
        assert not {f.path for f in index.search(vectors[0], 400)} & {index.path(f"{i}.png") for i in range(500)}
        index.remove(index.paths()[:2000])
        assert index.faiss.ntotal == 501 and "IDMap" in type(index.faiss).__name__


def test_killed_at_any_moment_it_opens_and_goes_on(photos, tmp_path, eye):
    for i in range(60):
        paint(photos / "many" / f"{i}.png", (i * 4, 255 - i, i * 7 % 256), salt=i)
    total = len(list(find_photos(photos)))
    folder, rng, sizes = tmp_path / "index", np.random.default_rng(0), set()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["polysense.app.index", "polysense.pipeline"])
    for moment in rng.uniform(0.0, 0.5, 10):
        begun = server.Event()
        child = server.Process(target=churn, args=(folder, photos, begun), daemon=True)
        child.start()
        assert begun.wait(60)
        time.sleep(moment)
        assert child.is_alive(), "the child died by itself"
        child.kill()
        child.join()
        if (folder / "photos.sqlite").exists():
            with Index.open(folder) as index:
                agrees(index, eye)
                sizes.add(len(index))
    assert len(sizes) > 2, "the kills fell into different moments"
    with open_index(folder, eye) as index:
        index.update(photos, eye)
        assert len(index) == total
        agrees(index, eye)
    left = {p.name for p in folder.iterdir() if p.suffix not in {".sqlite-wal", ".sqlite-shm"}}
    assert left == {"photos.sqlite", "vectors.faiss", "writer.lock"}, "no debris of the killed"


NAMES = st.sampled_from(["a.png", "b.png", "x/a.png", "x/y/b.png", "é.png"])
STEPS = st.lists(st.one_of(st.tuples(st.just("paint"), NAMES, st.sampled_from(list(RGB)), st.integers(0, 999)), st.tuples(st.just("delete"), NAMES),
                           st.tuples(st.just("forget"), NAMES), st.just(("update",)), st.just(("reopen",))), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_history_gives_what_a_dictionary_gives(steps, tmp_path_factory):
    eye, photos = pipeline(), tmp_path_factory.mktemp("photos")
    naive, index, clock = {}, open_index(photos / NAME, eye), 10 ** 9
    for step in [*steps, ("update",)]:
        match step:
            case ("paint", name, colour, salt):
                paint(photos / name, colour, salt=salt)
                clock += 1
                os.utime(photos / name, (clock, clock))
            case ("delete", name):
                (photos / name).unlink(missing_ok=True)
            case ("forget", name):
                index.remove([photos / name])
                naive.pop(str(photos / name), None)
            case ("update",):
                index.update(photos, eye, batch_size=2)
                naive = {str(p): eye.encode(images=[p])[0] for p in photos.rglob("*.png")}
            case ("reopen",):
                index.close()
                index = open_index(photos / NAME, eye)
        assert index.paths() == sorted(naive)
        if naive:
            query = eye.encode(texts=["magenta"])[0]
            got = index.search(query, 3)
            assert np.allclose([f.score for f in got], sorted((float(v @ query) for v in naive.values()), reverse=True)[:3], atol=1e-5)
            assert all(abs(float(naive[f.path] @ query) - f.score) < 1e-5 for f in got)
    index.close()


def test_another_spelling_of_the_folder_is_the_same_folder(photos, tmp_path, eye, monkeypatch):
    with open_index(photos / NAME, eye) as index:
        index.update(photos, eye)
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(photos)
    for spelling in (tmp_path / "link", Path("."), Path("d0/..")):
        with open_index(spelling / NAME, eye) as index:
            report = index.update(spelling, eye)
            assert (report.unchanged, report.added, report.removed) == (8, 0, 0)
    with open_index(photos / NAME, eye) as index:
        assert index.remove([tmp_path / "link" / "d0", "d1/1-green.png"]) == 4


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_file_that_cannot_be_opened_is_tried_again(photos, eye, monkeypatch):
    import polysense.app.photos as module
    closed, inner = True, module.digest

    def guarded(path):
        if closed and path.endswith("0-red.png"):
            raise PermissionError(13, "Permission denied")
        return inner(path)

    monkeypatch.setattr(module, "digest", guarded)
    with open_index(photos / NAME, eye) as index:
        assert [r for _, r in index.update(photos, eye).skipped] == ["cannot be opened (Permission denied)"]
        closed = False
        assert index.update(photos, eye).added == 1 and index.skipped() == []
