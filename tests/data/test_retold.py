"""Rewritten captions (LaCLIP) and dictionary knowledge (K-LITE): what the sources hand out, and how it is made."""
import json
from collections import Counter

import numpy as np
import pytest

from polysense.base.errors import UserError
from polysense.base.system import Feed, ImagePlan, TextPlan
from polysense.data import source
from polysense.data.knowledge import Knowledge, informed, lemmas, parted
from polysense.data.loader import Loader
from polysense.data.retold import prompted
from polysense.data.rewrites import INSTRUCTION, POOLS, Continued, Paraphraser, prompt, rewrite_file, rewrite_lines, rewritten
from polysense.data.sources import ListSource
from polysense.data.tokenizer import make_tokenizer

GREY = np.zeros((8, 8, 3), np.uint8)


def captioned(*captions: str) -> ListSource:
    return ListSource("said", [{"id": i, "image": GREY, "captions": [c]} for i, c in enumerate(captions)], ("image", "text"))


# Rewrites

def test_a_prompt_has_the_instruction_three_different_examples_and_never_the_caption_itself():
    pool = [*POOLS["human"], ("sheep on a green hill", "Sheep stand on a hill that is green.")]
    for seed in range(30):
        made = prompt("Sheep on a green hill ", pool, np.random.default_rng(seed))
        lines = made.removeprefix(INSTRUCTION).splitlines()
        assert made.startswith(INSTRUCTION) and len(lines) == 4 and lines[-1] == "Sheep on a green hill  =>"
        examples = [line.split(" => ") for line in lines[:3]]
        assert len({a for a, _ in examples}) == 3 and all((a, b) in pool and "sheep" not in a for a, b in examples)
    with pytest.raises(UserError, match="at least 3"):
        prompt("a", pool[:2], np.random.default_rng(0))


def test_there_are_four_pools_of_enough_examples():
    assert len(POOLS) == 4 and all(len(p) >= 4 and all(a.strip() and b.strip() for a, b in p) for p in POOLS.values())


def test_a_language_model_is_asked_once_a_line_and_its_first_line_counts():
    asked = []

    def write(text: str, seed: int) -> str:
        asked.append((text, seed))
        return f"  said anew {len(asked)}\nand a second line"

    got = rewrite_lines(["a red ring", "a blue star"], Continued(write), "chat", seed=3)
    assert got == ["said anew 1", "said anew 2"] and len({s for _, s in asked}) == 2 and asked[1][0].endswith("a blue star =>")


def test_resumed_rewriting_gives_the_same_lines(tmp_path):
    data = captioned(*(f"a {c} {s}" for c in ("red", "blue", "green") for s in ("ring", "star", "cross")))
    whole = rewrite_file(data, tmp_path / "whole.txt", Paraphraser(), "human", seed=1, batch=4).read_text()
    assert len(whole.splitlines()) == 9
    (tmp_path / "half.txt").write_text(whole[:len(whole) // 2])                      # broken off in the middle of a line
    assert rewrite_file(data, tmp_path / "half.txt", Paraphraser(), "human", seed=1, batch=4).read_text() == whole
    assert rewrite_file(data, tmp_path / "half.txt", Paraphraser(), "human", seed=2).read_text() == whole, "a finished file is left alone"
    other = rewrite_file(data, tmp_path / "other.txt", Paraphraser(), "human", seed=2).read_text()
    assert other != whole


def test_rewrites_keep_the_nouns_of_their_source():
    data = source("scenes:single?n=200&seed=0")
    said = [data.about(i)["captions"][0] for i in range(len(data))]
    kept = total = 0
    for pool in POOLS:
        for i, line in enumerate(rewrite_lines(said, Paraphraser(), pool, 0)):
            noun = data.classes[data.about(i)["label"]]
            if noun in said[i]:
                total += 1
                kept += noun in line
    assert total > 400 and kept / total >= 0.9


def test_misaligned_lines_are_refused(tmp_path):
    data = captioned("one ring", "two rings")
    with pytest.raises(UserError, match="3 lines for 2 samples"):
        rewritten(data, ["a", "b", "c"])
    (tmp_path / "long.txt").write_text("a b\nc d\ne f\n")
    with pytest.raises(UserError, match="3 lines for 2 samples: it belongs to other data"):
        rewrite_file(data, tmp_path / "long.txt", Paraphraser(), "human")


def test_all_tellings_are_drawn_alike_and_short_ones_count_as_the_original():
    data = rewritten(captioned("a red ring on a wall"), ["one one one"], ["two two two"], ["three three"], ["short"])
    assert data.about(0)["captions"] == ["a red ring on a wall", "one one one", "two two two", "three three", "a red ring on a wall"]
    feed = Feed(image=ImagePlan(size=8), text=TextPlan(vocab=300, length=32))
    words = make_tokenizer(feed.text, data.captions())
    loader, drawn = iter(Loader(data, feed, words, batch_size=100, seed=0, needs=("text",))), Counter()
    for _ in range(100):
        drawn.update(tuple(t for t in row if t != 2) for row in next(loader)["text"].tolist())
    shares = sorted(n / 10_000 for n in drawn.values())
    assert len(drawn) == 4 and shares == pytest.approx([0.2, 0.2, 0.2, 0.4], abs=0.02)


def test_no_rewrites_change_nothing():
    plain = captioned("a red ring", "a blue star", "one green cross")
    feed = Feed(image=ImagePlan(size=8), text=TextPlan(vocab=300, length=32))
    words = make_tokenizer(feed.text, plain.captions())
    a, b = (next(iter(Loader(d, feed, words, batch_size=6, seed=4, needs=("image", "text")))) for d in (plain, rewritten(plain)))
    assert all((a[k] == b[k]).all() for k in a)


# Knowledge

BOOK = Knowledge.of({"blick": "a red star with a hole", "sea lion": "an eared seal", "lion": "a big cat", "city": "a large town",
                     "run": "to go fast"})


def test_lookup_reads_inflected_forms_punctuation_and_longer_names():
    assert BOOK.gloss("Blicks") == BOOK.gloss("BLICK!") == "a red star with a hole"
    assert BOOK.gloss("cities") == "a large town" and BOOK.gloss("running") == "" and "run" in lemmas("runing")
    assert BOOK.gloss("sea lion") == "an eared seal" and BOOK.gloss("old mountain lion") == "a big cat", "leading words are dropped one by one"
    assert BOOK.gloss("zzyzx") == BOOK.gloss("") == BOOK.gloss("...") == ""


def test_forms_are_followed_and_circles_end(tmp_path):
    rows = [{"word": "mice", "senses": [{"glosses": ["plural of mouse"], "form_of": [{"word": "mouse"}]}]},
            {"word": "mouse", "senses": [{"glosses": ["a small rodent", "more"]}, {"glosses": ["a pointing device"]}]},
            {"word": "a1", "senses": [{"form_of": [{"word": "b1"}]}]}, {"word": "b1", "senses": [{"alt_of": [{"word": "a1"}]}]}]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    book = Knowledge.read(tmp_path / "words.jsonl")
    assert book.gloss("mice") == book.gloss("mouse") == "a small rodent" and book.gloss("a1") == "", "first sense only; a circle says nothing"
    (tmp_path / "net.json").write_text(json.dumps({"crow": {"definition": "a black bird", "hypernyms": ["corvine bird", "bird"]}}))
    assert Knowledge.read(tmp_path / "net.json").gloss("crow") == "a black bird ; corvine bird , bird"
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(UserError, match="no dictionary"):
        Knowledge.read(tmp_path / "bad.json")


def test_text_and_gloss_can_be_parsed_back_and_the_name_comes_first():
    made = BOOK.enrich("a photo of a blick.", "blick")
    assert made == "a photo of a blick. ; blick , a red star with a hole"
    assert parted(made) == ("a photo of a blick.", "blick", "a red star with a hole") and parted("just text") == ("just text", "", "")
    assert BOOK.enrich("a photo of a dax.", "dax") == "a photo of a dax.", "no gloss, plain prompt"
    feed = TextPlan(vocab=300, length=12)
    words = make_tokenizer(feed, ["a photo of a blick."] * 50)
    assert words([made])[0, :6].tolist() == words(["a photo of a blick."])[0, :6].tolist(), "cut short, the class name stays"


def test_captions_get_the_glosses_of_the_concepts_they_mention():
    data = informed(captioned("two sea lions near the city", "nothing known here"), BOOK)
    assert data.about(0)["captions"] == ["two sea lions near the city", "two sea lions near the city ; sea lions , an eared seal",
                                         "two sea lions near the city ; city , a large town"]
    assert data.about(1)["captions"] == ["nothing known here"]
    assert BOOK.concepts("blick number three, a red city hall of the run") == ["blick", "red city", "run"]
    kinds = ListSource("kinds", [{"id": 0, "image": GREY, "label": 0}], ("image", "label"), classes=("blick",))
    assert informed(prompted(kinds, ("a {}.",)), BOOK).about(0)["captions"] == ["a blick.", "a blick. ; blick , a red star with a hole"]


def test_a_class_is_asked_for_with_all_that_is_said_of_it_and_captions_get_the_first(tmp_path):
    (tmp_path / "said.json").write_text(json.dumps({"crow": ["a black bird", "a bird that caws", "a clever bird"], "dax": "a toy"}))
    book = Knowledge.read(tmp_path / "said.json")
    assert book.glosses("crows") == ("a black bird", "a bird that caws", "a clever bird") and book.gloss("crow") == "a black bird"
    assert book.prompts(["crow", "dax", "zig"], ["a {}.", "the {}."]) == [
        [f"{t} crow. ; crow , {g}" for t in ("a", "the") for g in book.glosses("crow")], ["a dax. ; dax , a toy", "the dax. ; dax , a toy"],
        ["a zig.", "the zig."]]
    assert informed(captioned("a crow"), book).about(0)["captions"] == ["a crow", "a crow ; crow , a black bird"], "one telling of each concept"
    assert Knowledge.read(book.write(tmp_path / "again.jsonl")).glosses("crow") == book.glosses("crow")


def test_an_empty_dictionary_changes_nothing():
    plain = captioned("a red ring", "a blue star")
    told = informed(plain, Knowledge())
    assert [told.about(i) for i in range(2)] == [plain.about(i) for i in range(2)]
    assert Knowledge().prompts(["ring"], ["a {}."]) == [["a ring."]]
