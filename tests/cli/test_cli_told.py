"""`polysense train` of the rows whose texts or labels are told by their feed, a few steps each, on data of the house and on a user's own."""
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import polysense
from polysense.cli import main
from polysense.data.scenes.glossary import GLOSSES

SCENES = "scenes:combos?n=64&size=32"
FAST = ("batch_size=16", "text.body.depth=1", "feed.train_image.size=32", "feed.image.size=32", "--steps", "2", "--workers", "0")
VIT = ("vision.image_size=32", *FAST)


def run(*words: object) -> int:
    return main([str(w) for w in words])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures with captions, and nothing else."""
    place = tmp_path_factory.mktemp("photos")
    for i in range(24):
        Image.fromarray(np.full((32, 32, 3), 10 * i, np.uint8)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"blick number {i}\n")
    return place


def words_of(folder) -> str:
    """The tokenizer of a run learns its words from the texts of training."""
    pipeline = polysense.open(folder)
    return " ".join(pipeline.tokenizer.token(i) for i in range(pipeline.tokenizer.vocab))


def test_klite_trains_with_a_dictionary_and_is_asked_with_it(tmp_path):
    assert run("train", "klite", *FAST, "--data", SCENES, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "preset.txt").read_text().count("feed.told") >= 3
    assert "middle" in words_of(tmp_path / "run"), "a word of the glosses, of no caption"
    pipeline = polysense.open(tmp_path / "run")
    asked, by_hand = pipeline.encode(texts=["a star"]), pipeline.encode(texts=[f"a star ; star , {GLOSSES['star']}"])
    np.testing.assert_allclose(asked, by_hand, atol=1e-6)
    assert abs(pipeline.encode(texts=["a dax"]) - asked).max() > 1e-3
    row, plain = pipeline.prompts(["star"], "a {}."), pipeline.system.encode_text(pipeline.read_texts(["a star."])).detach().numpy()
    assert abs(row - plain).max() > 1e-3, "class prompts carry the gloss too"


def test_klite_takes_a_dictionary_of_ones_own_and_says_where_one_is_missing(tmp_path, photos, capsys):
    assert run("train", "klite", *FAST, "--data", photos, "--out", tmp_path / "no", "--no-preflight") == 2
    assert "feed.told.1.dictionary=FILE" in capsys.readouterr().err and not (tmp_path / "no").exists()
    (tmp_path / "words.json").write_text(json.dumps({"blick": "a quadrangular thing"}))
    assert run("train", "klite", f"feed.told.1.dictionary={tmp_path / 'words.json'}", *FAST, "--data", photos, "--out", tmp_path / "run",
               "--no-preflight") == 0
    assert "quad" in words_of(tmp_path / "run")


def test_klite_goes_on_bit_for_bit_where_it_stopped(tmp_path, monkeypatch):
    import polysense.train.run as module

    assert run("train", "klite", *FAST, "--data", SCENES, "--out", tmp_path / "whole") == 0
    real = module.fit

    def cut(*words, **options):
        for step in real(*words, **options):
            yield step
            if step.index == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "fit", cut)
    options = ("train", "klite", *FAST, "--data", SCENES, "--out", tmp_path / "cut")
    assert run(*options) == 130
    monkeypatch.setattr(module, "fit", real)
    assert run("train", "klite", "--out", tmp_path / "cut", "--resume") == 0
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut"))
    assert all((one[k] == two[k]).all() for k in one)


def test_laclip_rewords_by_rules_or_reads_rewrites_and_the_paper_refuses_data_without(tmp_path, photos, capsys):
    assert run("train", "laclip", *VIT, "--data", photos, "--out", tmp_path / "rules") == 0
    assert "scene" in words_of(tmp_path / "rules"), "a word of the rules' frames"
    assert run("train", "laclip", "feed.told.0.voices=()", *VIT, "--data", photos, "--out", tmp_path / "no") == 2
    assert "x.rewrites.txt" in capsys.readouterr().err
    for i in range(24):
        (photos / f"{i}.rewrites.txt").write_text(f"something quadrangular, {i}\n")
    assert run("train", "laclip", "feed.told.0.voices=()", *VIT, "--data", photos, "--out", tmp_path / "own") == 0
    said = words_of(tmp_path / "own")
    assert "quad" in said and "scene" not in said


def test_unicl_trains_on_named_kinds_and_captions_together(tmp_path, photos):
    for kind in ("goose", "heron"):
        (tmp_path / "kinds" / kind).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((32, 32, 3), 10 * i, np.uint8)).save(tmp_path / "kinds" / kind / f"{i}.png")
    assert run("train", "unicl", *FAST, "--data", f"{tmp_path / 'kinds'}+{photos}", "--out", tmp_path / "run") == 0
    said = words_of(tmp_path / "run")
    assert "heron" in said and "blick" in said and "graffiti" in said, "names, captions and templates"


def test_mofi_asks_a_judge_and_labels_what_it_confirms(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POLYSENSE_CACHE", str(tmp_path / "cache"))
    assert run("train", "clip", *VIT, "--data", SCENES, "--out", tmp_path / "clip") == 0
    told = ("feed.told.0.rare=1", "feed.told.0.dropped=0.5")
    assert run("train", "mofi", f"feed.told.0.judge={tmp_path / 'clip'}", *told, *VIT, "--data", SCENES, "--out", tmp_path / "run") == 0
    assert "32 of 64 samples show what their texts name, says clip" in capsys.readouterr().err
    assert len(list((tmp_path / "cache" / "judged").glob("*.safetensors"))) == 1, "what the judge saw is kept for a run that goes on"
    assert run("train", "mofi", "feed.told.0.judge=deit", *VIT, "--data", SCENES, "--out", tmp_path / "no") == 2
    assert "'deit' cannot judge" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_compare_lets_each_train_on_what_its_feed_tells(tmp_path):
    assert run("compare", "clip", "klite", "laclip", "--data", SCENES, "--steps", 1, "--seeds", 1, "--out", tmp_path / "out", "--exams", "zero_shot",
               *[w for w in VIT if "=" in w]) == 0
    facts = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert facts["facts"]["systems"] == ["clip", "klite", "laclip"] and not facts["left_out"]
    plans = {n: json.loads((tmp_path / "out" / "runs" / f"{n}-s0" / "run.json").read_text())["plan"]["feed"] for n in ("clip", "klite", "laclip")}
    assert "told" not in plans["clip"] and [t["is"].rpartition(":")[2] for t in plans["klite"]["told"]] == ["Triplets", "Glosses"]
    assert plans["laclip"]["told"][0]["voices"]
