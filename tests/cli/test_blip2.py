"""BLIP-2 through the command line: train, caption, ask, match, examine."""
import json

import pytest
from PIL import Image

from polysense.cli import main


def run(capsys, *words):
    capsys.readouterr()
    assert main([str(w) for w in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of one step a stage, without the CLIP that tiny stands on, and a picture."""
    place = tmp_path_factory.mktemp("blip2")
    assert main(["train", "blip2", "starts=()", "batch_size=8", "vision.body.depth=2", "qformer.depth=2", "--data", "scenes?n=30", "--steps", "3",
                 "--out", str(place / "run"), "--workers", "0"]) == 0
    Image.new("RGB", (80, 60), "blue").save(place / "blue.png")
    return place


def test_captions_and_answers(place, capsys):
    told = json.loads(run(capsys, "caption", place / "blue.png", "-m", place / "run", "--json"))
    assert "blue.png" in json.dumps(told)
    assert json.loads(run(capsys, "ask", place / "blue.png", "what colour is it?", "-m", place / "run", "--json"))
    run(capsys, "caption", place / "blue.png", "-m", place / "run", "--how", "beam:3")


def test_matching_and_a_second_look(place, capsys):
    told = json.loads(run(capsys, "match", place / "blue.png", "a blue square", "a red circle", "-m", place / "run", "--json"))
    assert len(told["texts"]) == 2 and all(0 < t["probability"] < 1 for t in told["texts"])
    told = json.loads(run(capsys, "exam", place / "run", "retrieval", "rerank=2", "--data", "scenes?n=8", "--json"))
    assert told["notes"]["rerank"] == 2


def test_it_does_not_ground_and_says_who_does(place, capsys):
    assert main(["match", str(place / "blue.png"), "a dog", "-m", str(place / "run"), "--why", str(place / "w.png")]) == 2
    assert "ground_text" in capsys.readouterr().err and not (place / "w.png").exists()
