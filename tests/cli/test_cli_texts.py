"""polysense fill and translate, and encode, on toy runs of bert and transformer."""
import json

import numpy as np
import pytest

import polysense
from polysense.base.errors import UserError
from polysense.cli import main


def said(capsys, *words):
    capsys.readouterr()
    assert main([str(w) for w in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words):
    capsys.readouterr()
    assert main([str(w) for w in words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    lines = [f"the {c} {s} stands {w} of the river.\nit is {c} and very {z}." for c in ("red", "green", "blue") for s in ("house", "tree")
             for w in ("left", "right") for z in ("old", "small")]
    (place / "book.txt").write_text("\n\n".join(lines), encoding="utf-8")
    pairs = [f"{n} {c}\tthere are {n} {c} birds" for n in ("two", "three", "four", "five") for c in ("red", "green", "blue", "black", "white")]
    (place / "pairs.txt").write_text("\n".join(pairs), encoding="utf-8")
    common = ["--steps", "4", "--workers", "0", "batch_size=8"]
    assert main(["train", "bert", "--data", str(place / "book.txt"), "--out", str(place / "bert"), "text.body.depth=1", *common]) == 0
    assert main(["train", "transformer", "--data", str(place / "pairs.txt"), "--out", str(place / "transformer"), *common]) == 0
    return place


def test_fill(place, capsys):
    told = json.loads(said(capsys, "fill", "the ___ tree stands [MASK] of the river.", "-m", place / "bert", "-k", 3, "--json"))
    assert [len(g) for g in told["gaps"]] == [3, 3]
    for gap in told["gaps"]:
        chances = [g["probability"] for g in gap]
        assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1 and all(g["word"] and not g["word"].startswith("[") for g in gap)
    assert "probability" in said(capsys, "fill", "a ___", "-m", place / "bert")


def test_what_is_not_read_does_not_matter_and_the_rest_does(place):
    pipeline = polysense.open(place / "bert")
    one, two, other = (pipeline.fill(t)[0] for t in ("the ___ tree", "the <mask> tree", "the ___ river"))
    assert one == two and [g.probability for g in one] != [g.probability for g in other]


@pytest.mark.parametrize("text, says", [("no gap here", "___"), ("___ " + "river " * 60, "shorter")])
def test_texts_that_cannot_be_filled(place, capsys, text, says):
    assert says in refused(capsys, "fill", text, "-m", place / "bert")


def test_translate(place, capsys):
    one = said(capsys, "translate", "two red", "five white", "-m", place / "transformer", "--max-new", 4)
    assert len(one.split("\n")) == 3
    (place / "in.txt").write_text("two red\n\nfive white\n", encoding="utf-8")
    said(capsys, "translate", "--file", place / "in.txt", "--out", place / "out.txt", "-m", place / "transformer", "--max-new", 4)
    assert (place / "out.txt").read_text(encoding="utf-8") == one
    told = json.loads(said(capsys, "translate", "two red", "-m", place / "transformer", "--how", "greedy", "--max-new", 2, "--json"))
    assert told["translations"][0]["text"] == "two red" and isinstance(told["translations"][0]["translation"], str)


@pytest.mark.parametrize("words, says", [((), "--file"), (("a", "--file", "b.txt"), "--file"), (("--file", "none.txt"), "none.txt"),
                                         ((" ",), "nothing"), (("two red", "--how", "luck"), "beam:5")])
def test_what_cannot_be_translated(place, capsys, words, says):
    assert says in refused(capsys, "translate", *words, "-m", place / "transformer")


def test_who_cannot_says_who_can(place, capsys):
    assert "bert" in refused(capsys, "fill", "a ___", "-m", place / "transformer")
    assert "transformer" in refused(capsys, "translate", "a", "-m", place / "bert")
    with pytest.raises(UserError, match="pictures"):
        polysense.open(place / "bert").read_images([np.zeros((4, 4, 3), np.uint8)])


@pytest.mark.parametrize("name", ["bert", "transformer"])
def test_encode_texts(place, capsys, name):
    told = json.loads(said(capsys, "encode", place / "book.txt", "-m", place / name, "--out",
                           place / f"{name}.npz", "--json"))
    vectors = np.load(place / f"{name}.npz")["vector"]
    assert told["encoded"] == len(vectors) and vectors.shape[1] == 128
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
