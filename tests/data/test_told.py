"""What a preset's feed tells about its samples: the batches that training gets, and how prompts are asked. Each of the four rows by its own feed."""
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from polysense.base.catalogue import preset_of
from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.base.telling import Entities, Glosses, Rewrites, ToldFeed, Triplets
from polysense.data import source
from polysense.data.entities import Entity, EntityBase
from polysense.data.knowledge import Knowledge
from polysense.data.loader import Loader
from polysense.data.scenes.glossary import GLOSSES
from polysense.data.scenes.palette import COLOURS, SHAPES
from polysense.data.sources import ConcatSource, ListSource
from polysense.data.tokenizer import make_tokenizer
from polysense.data.told import dictionary, prompts, queries, tellings, told

GREY = np.zeros((16, 16, 3), np.uint8)
ROWS = ("klite", "laclip", "unicl", "mofi")


def captioned(*captions: str, **more: list) -> ListSource:
    rows = [{"id": i, "image": GREY, "captions": [c], **{k: v[i] for k, v in more.items()}} for i, c in enumerate(captions)]
    return ListSource("said", rows, ("image", "text", *(["label"] if "label" in more else [])))


def kinds(n: int, *classes: str) -> ListSource:
    return ListSource("kinds", [{"id": i, "image": GREY, "label": i % len(classes)} for i in range(n)], ("image", "label"), classes=classes)


def batches(data, feed, needs, count: int = 1, judge=None, **options):
    """(`count` batches of training as the feed says, the strings of their texts)."""
    data = told(data, feed, judge)
    words = make_tokenizer(feed.text, data.captions())
    loader = iter(Loader(data, feed, words, **{"batch_size": 32, "seed": 0, "needs": needs, **options}))
    made = [next(loader) for _ in range(count)]
    return made, [words.decode(row) for b in made for row in b["text"].tolist()]


# Each row's tiny feed

def test_klite_texts_come_with_and_without_what_the_dictionary_says():
    feed = preset_of("klite").feed
    (batch,), said = batches(source("scenes:combos?n=64&size=32"), feed, ("image", "text", "label"))
    with_gloss = [t for t in said if ";" in t]
    assert 0 < len(with_gloss) < len(said) == 32 and set(batch["label"].tolist()) <= set(range(180))
    glosses = {g.replace(" ", "") for g in GLOSSES.values()}
    for text in with_gloss:
        head, _, rest = text.partition(";")
        name, _, gloss = rest.partition(",")
        assert gloss.replace(" ", "") in glosses and name.split()[-1] in head, text


def test_klite_labelled_pictures_are_called_by_name_and_definition():
    feed = preset_of("klite").feed.but(told=(Triplets(templates=("a photo of a {}.",)), Glosses(dictionary="scenes")))
    (batch,), said = batches(kinds(40, "red_star", "dax"), feed, ("image", "text", "label"))
    stars, others = ({t for t, y in zip(said, batch["label"].tolist(), strict=True) if y == k} for k in (0, 1))
    assert {t.replace(" ", "") for t in stars} == {t.replace(" ", "") for t in (
        "a photo of a red star.", f"a photo of a red star. ; red star , {GLOSSES['star']}")}
    assert {t.replace(" ", "") for t in others} == {"aphotoofadax."}


def test_laclip_draws_alike_among_the_caption_and_its_four_rewrites():
    feed = preset_of("laclip").feed
    _, said = batches(captioned("a red ring on a wall"), feed, ("image", "text"), 20, batch_size=100)
    drawn = Counter(said)
    assert len(drawn) == 5 and "a red ring on a wall" in drawn and all("red ring on a wall" in t for t in drawn)
    assert sorted(n / 2000 for n in drawn.values()) == pytest.approx([0.2] * 5, abs=0.03)


def test_unicl_makes_triplets_of_labelled_and_captioned_pictures():
    web = captioned(*["two birds on a wire"] * 20)
    (batch,), said = batches(ConcatSource([kinds(20, "cat", "sea_lion"), web]), preset_of("unicl").feed, ("image", "text", "label"), batch_size=40)
    for text, label in zip(said, batch["label"].tolist(), strict=True):
        assert ("cat", "sea lion", "two birds on a wire")[label] in text and label in (-1, 0, 1)
    assert len({t for t, y in zip(said, batch["label"].tolist(), strict=True) if y == 0}) > 5, "templates are drawn anew"
    assert Counter(batch["label"].tolist())[-1] == 20


class Shown:
    """A judge that knows what is in each picture."""
    def __init__(self, *things: str):
        self.things = things

    def score(self, source, base, rows):
        return lambda i, texts: [float(self.things[i] in t) for t in texts]


def test_mofi_labels_are_the_entities_that_texts_name_and_pictures_show():
    feed = preset_of("mofi").feed.but(**{"told.0.rare": 1})
    alt = ["my red star", "a blue ring, sold", "my green cross", "a red star of mine", "what a day", "a grey heart", "a pink arrow",
           "two cyan diamonds", "an orange circle", "one brown square"]
    shows = ["red star", "blue ring", "white circle", "red star", "", "grey heart", "pink arrow", "cyan diamond", "orange circle", "brown square"]
    data = captioned(*alt, label=[0] * 10)
    made = told(data, feed, Shown(*shows))
    names = [made.classes[y] if (y := made.about(i)["label"]) >= 0 else "" for i in range(10)]
    assert names == [s if i != 2 else "" for i, s in enumerate(shows)], "the wrong mention is the worst tenth; labels of the data do not count"
    assert made.about(0)["captions"] == ["my red star", f"red star, {GLOSSES['star']}, in {GLOSSES['red']}"] and made.about(2)["captions"] == [alt[2]]
    (batch,), said = batches(data, feed, ("image", "text", "label"), judge=Shown(*shows), batch_size=20)
    assert set(batch["label"].tolist()) == {made.about(i)["label"] for i in range(10)} and "my green cross" in said
    everything = told(data, feed)
    assert everything.classes[everything.about(2)["label"]] == "green cross", "where nobody judges, names decide"


# As data, and resumable

@pytest.mark.parametrize("name", ROWS)
def test_presets_say_it_as_data(name):
    for preset in (preset_of(name), preset_of(name, "paper")):
        assert tellings(preset.feed) and isinstance(preset.feed, ToldFeed)
        assert from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
        assert any(line.startswith("feed.told.0 : ") for line in preset.lines())
    assert tellings(preset_of("clip").feed) == ()


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_depends_on_its_number_alone(name):
    """The third batch of one loader, of one that goes on from its state, of reading processes, and of two ranks."""
    preset = preset_of(name)
    feed = preset.feed.but(told=preset.feed.told)
    data = told(source("scenes:combos?n=48&size=32"), feed)
    words = make_tokenizer(feed.text, data.captions())
    needs = ("text", "label")

    def loader(**options):
        return Loader(told(source("scenes:combos?n=48&size=32"), feed), feed, words, **{"batch_size": 16, "seed": 3, "needs": needs, **options})

    first = loader()
    here = iter(first)
    for _ in range(2):
        next(here)
    state = json.loads(json.dumps(first.state()))
    want = next(here)
    for other in (loader(state=state), loader(state=state, workers=2)):
        got = next(iter(other))
        assert all((got[k] == want[k]).all() for k in needs)
    halves = [next(iter(loader(state=state, rank=r, world=2))) for r in (0, 1)]
    assert [y for h in halves for y in h["label"].tolist()] == want["label"].tolist()


# Data of one's own

def folder(place, rewrites: bool):
    for i in range(12):
        Image.fromarray(GREY + i).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"ring number {i}\n")
        if rewrites:
            (place / f"{i}.rewrites.txt").write_text(f"here is ring {i} again\n\nshort\n")
    return place


def test_rewrites_beside_the_captions_of_a_folder_are_drawn(tmp_path):
    data = source(str(folder(tmp_path, True)), split="all")
    feed = preset_of("laclip", "paper").feed.but(**{"text.vocab": 400, "text.length": 32, "image.size": 16, "train_image.size": 16})
    made = told(data, feed)
    assert made.about(3)["captions"] == [f"ring number {made.id(3)[:-4]}", f"here is ring {made.id(3)[:-4]} again", f"ring number {made.id(3)[:-4]}"]
    _, said = batches(data, feed, ("image", "text"), batch_size=64)
    assert 10 < sum("again" in t for t in said) < 35


def test_rewrites_in_columns_of_a_table_and_in_tars_are_read(tmp_path):
    folder(tmp_path, False)
    (tmp_path / "t.csv").write_text("image,caption,rewrite_0,rewrite_1\n0.png,a ring,one more ring,the ring here\n1.png,a star,,that star there\n")
    feed = ToldFeed(told=(Rewrites(),))
    made = told(source(str(tmp_path / "t.csv"), split="all"), feed)
    assert [made.about(i)["captions"] for i in (0, 1)] == [["a ring", "one more ring", "the ring here"], ["a star", "that star there"]]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, text in (("a.png", (tmp_path / "0.png").read_bytes()), ("a.txt", b"a ring"), ("a.rewrites.txt", b"one more ring\nsome ring")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    want = ["a ring", "one more ring", "some ring"]
    assert told(source(str(tmp_path / "s.tar"), split="all"), feed).about(0)["captions"] == want
    stream = told(source(f"{tmp_path / 's.tar'}?stream=1"), feed)
    assert list(stream.captions()) == want and {"image", "text"} <= set(stream.offers)
    batch = next(iter(Loader(stream, preset_of("laclip").feed.but(told=()), make_tokenizer(preset_of("laclip").feed.text, want), batch_size=8,
                             needs=("image", "text"))))
    assert len({tuple(t) for t in batch["text"].tolist()}) > 1


def test_files_of_rewrites_belong_to_samples_by_line(tmp_path):
    (tmp_path / "one.txt").write_text("one more ring\nthat star there\n")
    feed = ToldFeed(told=(Rewrites(files=(str(tmp_path / "one.txt"),)),))
    made = told(captioned("a ring", "a star"), feed)
    assert [made.about(i)["captions"] for i in (0, 1)] == [["a ring", "one more ring"], ["a star", "that star there"]]
    with pytest.raises(UserError, match="2 lines for 1 samples"):
        told(captioned("a ring"), feed)
    with pytest.raises(UserError, match="no file of rewrites"):
        told(captioned("a ring"), ToldFeed(told=(Rewrites(files=("nowhere.txt",)),)))


def test_of_several_captions_the_originals_together_are_drawn_as_often_as_a_rewrite():
    data = ListSource("s", [{"id": 0, "image": GREY, "captions": ["a ring", "one ring"], "rewrites": ["what a ring"]}], ("image", "text"))
    assert told(data, ToldFeed(told=(Rewrites(),))).about(0)["captions"] == ["a ring", "one ring", "what a ring", "what a ring"]
    made = told(data, ToldFeed(told=(Rewrites(voices=("chat",)),)))
    assert "what a ring" in made.about(0)["captions"], "rules do not replace what the data bring"


def test_a_dictionary_and_a_knowledge_base_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "words.json").write_text(json.dumps({"blick": "a red star with a hole"}))
    monkeypatch.setenv("POLYSENSE_DATA", str(tmp_path))
    for name in (str(tmp_path / "words.json"), "words"):
        feed = ToldFeed(told=(Glosses(dictionary=name),))
        assert told(captioned("two blicks"), feed).about(0)["captions"] == ["two blicks", "two blicks ; blicks , a red star with a hole"]
    book = Knowledge.of({"mouse": "a small rodent"})
    assert Knowledge.read(book.write(tmp_path / "again.jsonl")).entries == book.entries
    base = EntityBase([Entity("Q1", "jaguar", "a cat"), Entity("Q2", "lion")])
    assert EntityBase.read(base.write(tmp_path / "things.jsonl")).entities == base.entities
    made = told(captioned("my lion", "a jaguar"), ToldFeed(told=(Entities(base="things"),)))
    assert [made.classes[made.about(i)["label"]] for i in (0, 1)] == ["Q2", "Q1"]


def test_what_is_missing_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYSENSE_DATA", str(tmp_path))
    plain, wrong = captioned("two dogs"), tmp_path / "wrong.jsonl"
    wrong.write_text("[1")
    for feed, said in ((preset_of("laclip", "paper").feed, r"no rewrites.*x\.rewrites\.txt"),
                       (preset_of("klite", "paper").feed, r"no dictionary 'wiktionary': give a file \(feed\.told\.1\.dictionary=FILE\.jsonl\)"),
                       (preset_of("klite").feed, r"explains nothing.*feed\.told\.1\.dictionary"),
                       (preset_of("mofi").feed, r"names one of the 180 entities.*feed\.told\.0\.base"),
                       (preset_of("mofi", "paper").feed, r"no knowledge base 'wikidata'"),
                       (ToldFeed(told=(Entities(base=str(wrong)),)), "is no knowledge base"),
                       (ToldFeed(told=(Triplets(templates=("no place",)),)), "no templates"),
                       (ToldFeed(told=(Rewrites(voices=("loud",)),)), "voice 'loud'")):
        with pytest.raises(UserError, match=said):
            told(plain, feed)
    with pytest.raises(UserError, match="neither captions nor classes"):
        told(ListSource("bare", [{"id": 0, "image": GREY}], ("image",)), preset_of("unicl").feed)


# Prompts

def test_prompts_and_queries_are_asked_with_the_dictionary_of_the_feed(tmp_path):
    feed = preset_of("klite").feed
    assert prompts(feed, ["star", "dax"], ["a {}."]) == [[f"a star. ; star , {GLOSSES['star']}"], ["a dax."]]
    assert queries(feed, ["a star on the left", "a dax"]) == [f"a star on the left ; star , {GLOSSES['star']}", "a dax"]
    assert queries(feed, queries(feed, ["a star"])) == queries(feed, ["a star"]), "what carries a gloss stays"
    plain = preset_of("clip").feed
    assert prompts(plain, ["star"], ["a {}."]) == [["a star."]] and queries(plain, ["a star"]) == ["a star"]
    assert prompts(None, ["x"], ["{}"]) == [["x"]], "a subject without a preset"
    gone = feed.but(told=(Glosses(dictionary=str(tmp_path / "gone.json")),))
    with pytest.warns(UserWarning, match="asked without its knowledge"):
        assert queries(gone, ["a star"]) == ["a star"]


def test_the_built_in_dictionary_knows_all_that_scenes_name():
    book = dictionary("scenes")
    assert all(book.gloss(f"{c} {s}") == GLOSSES[s] for c in COLOURS for s in SHAPES) and all(book.gloss(c) for c in COLOURS)
