"""What Multiway transformers can, from files on the command line: search, a second look, answers, captions, hidden words."""
import json

import pytest
from PIL import Image

from polysense.cli import main


def run(*words: object) -> int:
    return main([str(w) for w in words])


SMALL = ("net.body.width=32", "net.body.heads=2", *(f"{n}_head.{k}=32" for n in ("image", "text") for k in ("into", "out")))
FUSED = ("pooler.into=32", "pooler.hidden=32", "match_head.into=32", *(f"fused_{n}_head.{k}=32" for n in ("image", "text") for k in ("into", "out")))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of two steps a stage in vlmo/ and beit_3/, whose tokenizers of pictures are as at birth, and a picture."""
    place = tmp_path_factory.mktemp("multiway")
    common = ("starts=()", "batch_size=8", "--data", "scenes?n=40", "--workers", 0)
    assert run("train", "vlmo", *SMALL, *FUSED, *common, "--steps", 8, "--out", place / "vlmo") == 0
    assert run("train", "beit_3", *SMALL, *common, "--steps", 6, "--out", place / "beit_3") == 0
    Image.new("RGB", (64, 64), "red").save(place / "red.png")
    return place


def out(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_second_look_and_answers(place, capsys):
    capsys.readouterr()
    assert run("match", place / "red.png", "a red circle", "a green square", "-m", place / "vlmo", "--json") == 0
    assert len(out(capsys)) >= 1
    assert run("exam", place / "vlmo", "retrieval", "rerank=3", "--data", "scenes?n=12", "--json") == 0
    assert "rerank" in capsys.readouterr().out
    assert run("ask", place / "red.png", "what colour is the thing?", "-m", place / "vlmo", "--json") == 0
    assert out(capsys)["answer"], "one of the answers that training met"


def test_captions_and_features(place, capsys):
    capsys.readouterr()
    assert run("caption", place / "red.png", "-m", place / "beit_3", "--json") == 0
    assert "red.png" in capsys.readouterr().out
    assert run("exam", place / "beit_3", "retrieval", "--data", "scenes?n=12", "--json") == 0
    capsys.readouterr()
    assert run("fill", "a ___ circle", "-m", place / "beit_3", "--json") == 0
    assert capsys.readouterr().out.strip()
    assert run("match", place / "red.png", "a red circle", "-m", place / "beit_3") == 2
    assert "match_text" in capsys.readouterr().err
