import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from colours import paint, pipeline

from polysense.app.label import label_folder, read_labels
from polysense.base.errors import UserError

COLOURS = ["red", "green", "blue"]


@pytest.fixture
def photos(tmp_path):
    for i in range(9):
        paint(tmp_path / "photos" / f"d{i % 2}" / f"{i}, \"{COLOURS[i % 3]}\".png", COLOURS[i % 3], salt=i)
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"torn")
    return tmp_path / "photos"


def rows(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def test_labels_go_to_csv(photos, tmp_path):
    (tmp_path / "labels.txt").write_text("red\n\n green \nblue\nred\n", encoding="utf-8")
    told, eye = [], pipeline()
    report = label_folder(eye, photos, tmp_path / "labels.txt", tmp_path / "o" / "out.csv", top=2, batch_size=4, progress=lambda *p: told.append(p))
    got = rows(tmp_path / "o" / "out.csv")
    assert list(got[0]) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert [r["path"] for r in got] == sorted(r["path"] for r in got) and len(got) == 10
    good = [r for r in got if not r["error"]]
    assert len(good) == 9 and all(r["label"] in r["path"] for r in good)
    want = dict(eye.label(photos / "d0" / "0, \"red\".png", COLOURS)[0].labels)
    assert abs(float(good[0]["probability"]) - want["red"]) < 1e-5
    assert report.labelled == 9 and report.counts == {"red": 3, "green": 3, "blue": 3} and report.resumed == 0
    assert [Path(p).name for p, _ in report.skipped] == ["torn.jpg"] and report.to_json()["skipped"][0]["reason"]
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["out.csv"]


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[3])
from colours import pipeline
from polysense.app.label import label_folder
label_folder(pipeline(), sys.argv[1], ["red", "green", "blue"], sys.argv[2], batch_size=2,
             progress=lambda done, total: done >= 4 and os.kill(os.getpid(), 9))
"""


def test_a_killed_run_goes_on_where_it_was(photos, tmp_path):
    out = tmp_path / "out.csv"
    child = subprocess.run([sys.executable, "-c", KILLED, photos, out, Path(__file__).parents[1]], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.returncode == -9 and not out.exists()
    with open(f"{out}.part", "ab") as f:
        f.write(b'{"path": "torn in the mid')
    eye, seen = pipeline(), []
    eye.encode_prepared = lambda batch, f=eye.encode_prepared: seen.append(len(batch)) or f(batch)
    (photos / "d0" / '0, "red".png').unlink()
    paint(photos / "d2" / "new.png", "blue")
    report = label_folder(eye, photos, COLOURS, out)
    assert report.resumed == 3 and report.labelled == 9 and sum(seen) == 6, "one of the four done has gone, one is new"
    whole = rows(out)
    assert label_folder(eye, photos, COLOURS, tmp_path / "again.csv").resumed == 0 and rows(tmp_path / "again.csv") == whole


@pytest.mark.parametrize("change", ["nothing", "labels", "model", "template", "garbage"])
def test_another_task_does_not_take_over_old_answers(photos, tmp_path, change):
    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    out = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        label_folder(pipeline(), photos, COLOURS, out, batch_size=2, progress=stop)
    if change == "garbage":
        Path(f"{out}.part").write_bytes(os.urandom(50) + b"\n[1]\n")
    eye = pipeline(gain=0.9 if change == "model" else 1.0)
    labels, templates = ["blue", "red"] if change == "labels" else COLOURS, "a {}." if change == "template" else "default"
    assert label_folder(eye, photos, labels, out, templates=templates).resumed == (4 if change == "nothing" else 0)


def test_an_old_answer_stays_whole_until_the_new_one_is(photos, tmp_path):
    out, eye = tmp_path / "out.csv", pipeline()
    out.write_text("old")
    with pytest.raises(RuntimeError):
        def stop(done: int, total: int) -> None:
            if done:
                raise RuntimeError
        label_folder(eye, photos, COLOURS, out, batch_size=2, progress=stop)
    assert out.read_text() == "old"


def test_wrong_input(photos, tmp_path):
    with pytest.raises(UserError, match="no labels"):
        label_folder(pipeline(), photos, [" "], tmp_path / "o.csv")
    with pytest.raises(UserError, match="cannot read the labels"):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        label_folder(pipeline(), tmp_path / "empty", COLOURS, tmp_path / "o.csv")
    with pytest.raises(UserError, match="at least one"):
        label_folder(pipeline(), photos, COLOURS, tmp_path / "o.csv", top=0)
