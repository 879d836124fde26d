"""ALBEF through the command line: train on captions, look twice, match, ground."""
import json

import pytest
from PIL import Image

from polysense.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of two steps in albef/, a picture, an empty and a torn file."""
    place = tmp_path_factory.mktemp("match")
    words = ["train", "albef", "--preset", "captions", "batch_size=8", "--data", "scenes?n=40", "--steps", "2",
             "--out", str(place / "albef"), "--workers", "0"]
    assert main(words) == 0
    Image.new("RGB", (90, 60), "red").save(place / "red.png")
    (place / "empty.png").touch()
    (place / "torn.png").write_bytes((place / "red.png").read_bytes()[:40])
    return place


def test_texts_are_ranked_by_their_probability_and_the_best_is_drawn(place, capsys):
    out = place / "where.png"
    assert main(["match", str(place / "red.png"), "a red circle", "a green square", "-m", str(place / "albef"), "--why", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    chance = [t["probability"] for t in told["texts"]]
    assert len(chance) == 2 and chance == sorted(chance, reverse=True) and all(0 < p < 1 for p in chance)
    assert Image.open(out).size == (90, 60)
    assert main(["match", str(place / "red.png"), "a red circle", "-m", str(place / "albef")]) == 0
    assert "a red circle" in capsys.readouterr().out


def test_retrieval_with_a_second_look(place, capsys):
    assert main(["exam", str(place / "albef"), "retrieval", "rerank=3", "--data", "scenes?n=12", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"]["rerank"] == 3 and 0 <= told["metrics"]["text_to_image_r5"]["value"] <= 1


def test_search_looks_at_the_best_again(place, capsys):
    photos = place / "photos"
    photos.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (70, 60 + i), colour).save(photos / f"{colour}.png")
    assert main(["index", str(photos), "-m", str(place / "albef")]) == 0
    (photos / "green.png").unlink()
    capsys.readouterr()
    ask = ["search", "a red circle", "--index", str(photos), "--json"]
    assert main([*ask, "--rerank", "4", "-k", "3", "--why", str(place / "why.html")]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len(hits) == 3 and [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True) and all(h["score"] > 0 for h in hits)
    for hit in hits:
        assert main(["match", hit["path"], "a red circle", "-m", str(place / "albef"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["texts"][0]["probability"] == pytest.approx(hit["score"], rel=1e-2)
    assert (place / "why.html").stat().st_size > 1000
    assert main(["search", "--image", str(photos / "red.png"), "--index", str(photos), "--rerank", "2"]) == 2
    assert "twice" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    (["match", "{place}/none.png", "a dog"], "no file"), (["match", "{place}/empty.png", "a dog"], "empty.png"),
    (["match", "{place}/torn.png", "a dog"], "torn.png"), (["match", "{place}/red.png", "  "], "empty")])
def test_bad_input_is_one_line(place, capsys, words, says):
    assert main([w.format(place=place) for w in words] + ["-m", str(place / "albef")]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert says in err[-1] and err[-1].startswith("error:")


def test_a_system_of_two_towers_says_who_can(place, capsys, tmp_path):
    assert main(["train", "clip", "text.body.depth=1", "batch_size=8", "--data", "scenes?n=20", "--steps", "1", "--out", str(tmp_path / "clip"),
                 "--workers", "0"]) == 0
    assert main(["match", str(place / "red.png"), "a dog", "-m", str(tmp_path / "clip")]) == 2
    assert "albef" in capsys.readouterr().err
    assert main(["exam", str(tmp_path / "clip"), "retrieval", "rerank=3", "--data", "scenes?n=8"]) == 2
    assert "match_text" in capsys.readouterr().err


def test_questions_need_the_answer_decoder(place, capsys, tmp_path):
    ask = ["ask", str(place / "red.png"), "what colour is the circle?", "-m"]
    assert main([*ask, str(place / "albef")]) == 2
    assert "no answer decoder" in capsys.readouterr().err
    assert main(["train", "albef", "batch_size=8", "--data", "scenes?n=30", "--steps", "2", "--out", str(tmp_path / "tiny"), "--workers", "0"]) == 0
    capsys.readouterr()
    assert main([*ask, str(tmp_path / "tiny"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
