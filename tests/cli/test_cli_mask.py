"""segment and detect from the command line."""
import json

import numpy as np
import pytest
from PIL import Image

from polysense.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sam") / "run"
    assert main(["train", "sam", "--data", "scenes:nested?n=8", "--steps", "1", "--out", str(out), "--json", "stages.0.batch_size=2"]) == 0
    return out


@pytest.fixture()
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 120, 3), dtype=np.uint8)).save(path)
    return path


def test_segment_writes_an_overlay_and_a_mask_and_answers_in_json(run, photo, tmp_path, capsys):
    capsys.readouterr()
    assert main(["segment", str(photo), "-m", str(run), "--point", "30,20", "--pixels", "--out", str(tmp_path / "o.png"),
                 "--mask", str(tmp_path / "m.png"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["masks"]) == 3 and told["size"] == [120, 60]
    assert Image.open(tmp_path / "o.png").size == (120, 60) and Image.open(tmp_path / "m.png").size == (120, 60)
    assert main(["segment", str(photo), "-m", str(run), "--box", "0.1,0.1,0.9,0.9", "--outside", "0.5,0.5", "--out", str(tmp_path / "o.png")]) == 0
    assert "predicted IoU" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "says"), [
    (["--point", "0.3"], "X,Y"), ([], "nothing says what"), (["--point", "3,4"], "not in the picture"),
    (["--point", "0.1,0.1", "--out", "a.txt"], "use .png"),
    (["--point", "0.1,0.1", "--out", "/no/such/a.png"], "no folder"), (["--box", "a,b,c,d"], "X0,Y0,X1,Y1")])
def test_segment_refuses_in_one_line(run, photo, capsys, words, says):
    capsys.readouterr()
    assert main(["segment", str(photo), "-m", str(run), *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_damaged_pictures_are_refused_before_anything_is_written(run, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    assert main(["segment", str(tmp_path / "bad.jpg"), "-m", str(run), "--point", "0.5,0.5", "--out", str(tmp_path / "o.png")]) == 2
    assert not (tmp_path / "o.png").exists() and "cannot read the picture" in capsys.readouterr().err


def test_detect_says_who_can_where_a_system_cannot(run, photo, capsys):
    assert main(["detect", str(photo), "-m", str(run), "--label", "a dog"]) == 2
    assert "cannot" in capsys.readouterr().err
    assert main(["detect", str(photo), "-m", str(run), "--labels", "/no/such.txt"]) == 2


def test_key_points_are_drawn_and_told(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "pix2seq_v2", "--data", "scenes?n=8", "--steps", "1", "--out", str(out), "--json", "stages.0.batch_size=2"]) == 0
    assert main(["data", "get", "scenes?n=1", str(tmp_path / "photos"), "-n", "1"]) == 0
    photo = str(next(p for p in (tmp_path / "photos").rglob("*") if p.suffix in (".png", ".jpg")))
    capsys.readouterr()
    words = ["detect", photo, "-m", str(out), "--threshold", "0", "--json"]
    assert main([*words, "--keypoints", "--out", str(tmp_path / "marked.png")]) == 0
    marked = json.loads(capsys.readouterr().out)["found"]
    assert main([*words, "--out", str(tmp_path / "plain.png")]) == 0
    plain = json.loads(capsys.readouterr().out)["found"]
    assert marked and [{k: v for k, v in d.items() if k != "points"} for d in marked] == plain and all(len(d["points"]) == 5 for d in marked)
    if any(p for d in marked for p in d["points"]):
        assert not np.array_equal(*(np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("marked", "plain")))


def test_key_points_are_refused_where_a_system_marks_none(run, photo, capsys):
    capsys.readouterr()
    assert main(["detect", str(photo), "-m", str(run), "--keypoints"]) == 2
    err = capsys.readouterr().err
    assert "marks no key points" in err and err.count("\n") == 1
