"""polysense caption, ask, chat on a toy run."""
import csv
import io
import json

import pytest

from polysense.cli import main

TOY = ["language.body.depth=1", "starts=()", "batch_size=8"]


def said(capsys, *words):
    capsys.readouterr()
    assert main([str(w) for w in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("talk")
    assert main(["train", "llava", *TOY, "--data", "scenes:qa?n=60", "--steps", "3", "--out", str(place / "run"), "--workers", "0"]) == 0
    assert main(["data", "get", "scenes:qa", str(place / "photos"), "--split", "test", "-n", "3"]) == 0
    return place


@pytest.fixture(scope="module")
def photo(place):
    return next(p for p in sorted((place / "photos").rglob("*.png")) if p.name != "broken.png")


def test_caption_a_folder(place, capsys):
    (place / "photos" / "broken.png").write_bytes(b"nothing")
    told = json.loads(said(capsys, "caption", place / "photos", "-m", place / "run", "--max-new", 4, "--json"))
    assert len(told["captions"]) == 3 and len(told["skipped"]) == 1 and all(isinstance(c["caption"], str) for c in told["captions"])
    said(capsys, "caption", place / "photos", "-m", place / "run", "--max-new", 4, "--out", place / "c.csv")
    with open(place / "c.csv", encoding="utf-8") as f:
        assert [tuple(r) for r in csv.reader(f)][1:] == [(c["path"], c["caption"]) for c in told["captions"]]


def test_ask_and_chat(place, photo, capsys, monkeypatch):
    told = json.loads(said(capsys, "ask", photo, "what colour is it?", "-m", place / "run", "--max-new", 4, "--json"))
    assert told["question"] == "what colour is it?" and isinstance(told["answer"], str)
    talk = json.loads(said(capsys, "chat", photo, "-m", place / "run", "--message", "what is it?", "--message", "sure?", "--max-new", 4, "--json"))
    assert [m["role"] for m in talk["messages"]] == ["user", "assistant"] * 2
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n\n"))
    assert said(capsys, "chat", photo, "-m", place / "run", "--max-new", 4) is not None


def test_errors_are_one_line(place, photo, capsys):
    for words in (("ask", "none.png", "what?", "-m", place / "run"), ("ask", photo, " ", "-m", place / "run"),
                  ("caption", "nowhere", "-m", place / "run"),
                  ("ask", photo, "what?", "-m", place / "run", "--how", "dream"), ("ask", photo, "what?", "-m", "nowhere"),
                  ("caption", place / "photos" / "broken.png", "-m", place / "run")):
        capsys.readouterr()
        assert main([str(w) for w in words]) == 2
        assert capsys.readouterr().err.count("\n") <= 2
