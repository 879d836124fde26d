"""Text files as data: sentences in documents, and pairs."""
import pytest

from polysense.base.errors import UserError
from polysense.base.plan import Feed, PairPlan, TextPlan
from polysense.data import source
from polysense.data.loader import Loader
from polysense.data.tokenizer import make_tokenizer


def written(path, text: str):
    path.write_text(text, encoding="utf-8")
    return source(path, split="all")


def test_lines_are_sentences_and_blank_lines_stand_between_documents(tmp_path):
    found = written(tmp_path / "a.txt", "\n one two\nthree\n\n\nfour\n\nfive six\nseven")
    assert [found.about(i)["captions"] for i in range(len(found))] == [["one two", "three"], ["four"], ["five six", "seven"]]
    assert [found.id(i) for i in range(3)] == ["line 2", "line 6", "line 8"] and found.offers == ("index", "text", "text_mask")


@pytest.mark.parametrize("end", ["", "\n"])
def test_without_blank_lines_each_line_is_a_document(tmp_path, end):
    found = written(tmp_path / "a.txt", "one\ntwo\nthree" + end)
    assert [found.about(i)["captions"] for i in range(len(found))] == [["one"], ["two"], ["three"]]


def test_two_texts_with_a_tab_between_them_are_a_pair(tmp_path):
    found = written(tmp_path / "a.txt", "guten Tag\tgood day\r\n\nein Hund\ta dog\r\n")
    assert [(a["question"], a["answer"]) for a in (found.about(i) for i in range(2))] == [("guten Tag", "good day"), ("ein Hund", "a dog")]
    assert {"question", "answer"} <= set(found.offers)
    mixed = written(tmp_path / "b.txt", "guten Tag\tgood day\nno pair\n")
    assert "question" not in mixed.offers and len(mixed) == 2


def test_a_tenth_is_held_out_and_the_same_each_time(tmp_path):
    text = "\n".join(f"sentence {i}" for i in range(200))
    whole = written(tmp_path / "a.txt", text)
    train, val = (source(tmp_path / "a.txt", split=s) for s in ("train", "val"))
    assert len(train) + len(val) == len(whole) == 200 and 5 < len(val) < 40


@pytest.mark.parametrize("content, says", [(b"", "holds no text"), (b"\n \n", "holds no text"), (b"\xff\xfe\x00a", "UTF-8")])
def test_what_is_no_text_is_refused(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=says):
        source(tmp_path / "a.txt")


def test_batches_depend_on_seed_and_place_alone(tmp_path):
    found = written(tmp_path / "a.txt", "\n\n".join(f"word{i} first\nword{i} second" for i in range(40)))
    plan = PairPlan(kind="wordpiece", vocab=300, length=24)
    tokenizer = make_tokenizer(plan, found.captions())
    load = lambda **more: iter(Loader(found, Feed(text=plan), tokenizer, batch_size=8, seed=5, needs=("text", "segment", "follows"), **more))
    one, two = load(), load(workers=0)
    first = [next(one) for _ in range(3)]
    assert all((a["text"] == b["text"]).all() and (a["follows"] == b["follows"]).all() for a, b in zip(first, [next(two) for _ in range(3)]))
    halves = [next(load(rank=r, world=2)) for r in range(2)]
    assert [t.tolist() for h in halves for t in h["follows"]] == first[0]["follows"].tolist()
    single = Feed(text=TextPlan(kind="wordpiece", vocab=300, length=24))
    plain = next(iter(Loader(found, single, tokenizer, batch_size=4, train=False, needs=("text",))))
    assert ((plain["text"] == 2).sum(1) == 1).all(), "another plan reads single sentences as before"
