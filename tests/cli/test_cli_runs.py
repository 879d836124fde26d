"""The whole way at toy size, through the command line: train, resume, examine, index, search, label, encode, convert, report."""
import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from polysense.cli import main

TOY = ["text.body.depth=1", "batch_size=16"]


def run(*words: object) -> int:
    return main([str(w) for w in words])


def said(capsys, *words: object):
    """What a command prints as JSON."""
    capsys.readouterr()
    assert run(*words, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of two steps in clip/ and thirty pictures in photos/."""
    place = tmp_path_factory.mktemp("cli")
    assert run("train", "clip", *TOY, "--data", "digits", "--steps", 2, "--out", place / "clip", "--workers", 0) == 0
    assert run("data", "get", "digits", place / "photos", "--split", "test", "-n", 30) == 0
    assert run("index", place / "photos", "-m", place / "clip") == 0
    return place


def test_train_leaves_a_whole_run_folder(place):
    folder = place / "clip"
    assert {"run.json", "preset.txt", "log.jsonl", "weights.safetensors", "tokenizer"} <= {p.name for p in folder.iterdir()}
    facts = json.loads((folder / "run.json").read_text())
    assert facts["system"] == "clip" and facts["data"] == "digits" and facts["plan"]["stages"][0]["steps"] == 2
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert "config.text.body.depth = 1" in (folder / "preset.txt").read_text()


def test_training_twice_from_one_seed_is_the_same(place, tmp_path, capsys):
    told = said(capsys, "train", "clip", *TOY, "--data", "digits", "--steps", 2, "--out", tmp_path / "again", "--workers", 0)
    assert told["steps"] == 2 and told["samples"] == 32
    one, two = (load_file(p / "weights.safetensors") for p in (place / "clip", tmp_path / "again"))
    assert all((one[k] == two[k]).all() for k in one)


def test_a_finished_run_is_not_trained_over(place, capsys):
    before = (place / "clip" / "weights.safetensors").read_bytes()
    assert run("train", "clip", *TOY, "--data", "digits", "--steps", 2, "--out", place / "clip") == 2
    assert "--resume" in capsys.readouterr().err
    assert run("train", "clip", "--out", place / "clip", "--resume") == 0
    assert (place / "clip" / "weights.safetensors").read_bytes() == before


def test_ctrl_c_says_how_to_go_on_and_resume_ends_the_same(place, tmp_path, capsys, monkeypatch):
    import polysense.train.run as module

    real, folder = module.fit, tmp_path / "cut"

    def cut(*words, **options):
        for step in real(*words, **options):
            yield step
            if step.index == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "fit", cut)
    assert run("train", "clip", *TOY, "--data", "digits", "--steps", 2, "--out", folder, "--workers", 0) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    command = re.search(r"`polysense (.*)`", line)
    assert command and not (folder / "weights.safetensors").exists()
    monkeypatch.setattr(module, "fit", real)
    assert run(*command[1].split()) == 0
    one, two = (load_file(p / "weights.safetensors") for p in (place / "clip", folder))
    assert all((one[k] == two[k]).all() for k in one)


def test_exam_prints_keeps_and_lists(place, capsys):
    told = said(capsys, "exam", place / "clip", "zero_shot", "--data", "digits")
    assert told["n"] == 359 and told["split"] == "test" and 0 <= told["metrics"]["accuracy"]["low"] <= told["metrics"]["accuracy"]["value"] <= 1
    kept = list((place / "clip" / "exams").glob("*.json"))
    assert [json.loads(p.read_text()) for p in kept] == [told]
    able = {e["exam"]: e["can"] for e in said(capsys, "exam", place / "clip")}
    assert able["zero_shot"] == able["retrieval"] == able["linear_probe"] == "yes"
    assert run("exam", place / "clip", "zero_shot", "colour=3", "--data", "digits") == 2
    assert "has no option 'colour'" in capsys.readouterr().err


def test_index_is_incremental_and_forgets(place, tmp_path, capsys):
    index = tmp_path / "index"
    first = said(capsys, "index", place / "photos", "-m", place / "clip", "--out", index)
    again = said(capsys, "index", place / "photos", "-m", place / "clip", "--out", index)
    assert (first["added"], again["added"], again["unchanged"], again["pictures"]) == (30, 0, 30, 30)
    some = next((place / "photos").glob("*.png"))
    assert said(capsys, "index", place / "photos", "-m", place / "clip", "--out", index, "--forget", some) == {"removed": 1, "pictures": 29}


def test_search_by_words_and_by_picture(place, tmp_path, capsys):
    hits = said(capsys, "search", "the digit five", "--index", place / "photos", "-k", 4, "--why", tmp_path / "why.png")["hits"]
    assert [h["rank"] for h in hits] == [1, 2, 3, 4] and [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)
    assert hits[0]["why"]["words"] is not None and min(Image.open(tmp_path / "why.png").size) > 200
    some = sorted((place / "photos").glob("*.png"))[7]
    hits = said(capsys, "search", "--image", some, "--index", place / "photos", "-k", 1)["hits"]
    assert hits[0]["score"] == pytest.approx(1, abs=1e-2)
    assert np.array_equal(np.asarray(Image.open(hits[0]["path"])), np.asarray(Image.open(some)))


def test_an_index_of_nothing_finds_nothing_and_draws_nothing(place, tmp_path, capsys):
    few, index = tmp_path / "few", tmp_path / "index"
    few.mkdir()
    only = few / "only.png"
    only.write_bytes(next((place / "photos").glob("*.png")).read_bytes())
    said(capsys, "index", few, "-m", place / "clip", "--out", index)
    assert said(capsys, "index", few, "-m", place / "clip", "--out", index, "--forget", only)["pictures"] == 0
    for words in ((), ("--why", tmp_path / "why.png")):
        assert run("search", "a five", "--index", index, *words) == 0 and "nothing found: the index is empty" in capsys.readouterr().out
    assert not (tmp_path / "why.png").exists()


def test_label_writes_a_row_a_picture(place, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("zero\none\ntwo\n")
    told = said(capsys, "label", place / "photos", "--labels", tmp_path / "labels.txt", "-m", place / "clip", "--out", tmp_path / "l.csv", "--top", 2)
    rows = list(csv.DictReader((tmp_path / "l.csv").open()))
    assert told["labelled"] == len(rows) == 30 and {r["label"] for r in rows} | {r["label_2"] for r in rows} <= {"zero", "one", "two"}


def test_encode_pictures_and_texts(place, tmp_path, capsys):
    assert said(capsys, "encode", place / "photos", "-m", place / "clip", "--out", tmp_path / "p.npz")["encoded"] == 30
    (tmp_path / "t.txt").write_text("a five\na six\n")
    assert said(capsys, "encode", tmp_path / "t.txt", "-m", place / "clip", "--out", tmp_path / "t.npz")["encoded"] == 2
    pictures, texts = np.load(tmp_path / "p.npz"), np.load(tmp_path / "t.npz")
    assert texts["text"].tolist() == ["a five", "a six"] and pictures["vector"].shape[1] == texts["vector"].shape[1]
    np.testing.assert_allclose(np.linalg.norm(pictures["vector"], axis=1), 1, atol=1e-4)


def test_convert_there_and_back_is_the_same(place, tmp_path, capsys):
    import torch

    import polysense

    told = said(capsys, "convert", place / "clip", tmp_path / "theirs", "--system", "clip", "--layout", "open_clip")
    assert told["direction"] == "export"
    system = polysense.open(place / "clip", device="cpu").system
    image, text = torch.randn(2, 3, 64, 64), torch.tensor([[1, 7, 9, 2], [1, 5, 2, 2]])
    with torch.inference_mode():
        recorded = {"image": image, "text": text, "encode_image": system.encode_image(image), "encode_text": system.encode_text(text)}
    save_file(recorded, tmp_path / "recorded.safetensors")
    words = ["--system", "clip", "--layout", "open_clip", "--check", tmp_path / "recorded.safetensors"]
    told = said(capsys, "convert", tmp_path / "theirs", tmp_path / "back", *words)
    assert told["direction"] == "import" and told["largest_difference"] < 1e-5
    one, two = (load_file(p / "weights.safetensors") for p in (place / "clip", tmp_path / "back"))
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)
    assert said(capsys, "search", "a five", "--index", place / "photos", "-m", place / "clip", "-k", 1)["hits"]
    save_file(recorded | {"encode_image": -recorded["encode_image"]}, tmp_path / "recorded.safetensors")
    assert run("convert", tmp_path / "theirs", tmp_path / "no", *words) == 2
    assert "encode_image differs" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_convert_names_what_a_published_file_did_not_say(place, tmp_path, capsys):
    """The reference was made with an activation, an epsilon or a resize kernel that the file does not mention: each is found, and --set mends it."""
    import torch

    import polysense
    from polysense.data.images import read_images

    assert run("convert", place / "clip", tmp_path / "theirs", "--system", "clip", "--layout", "open_clip") == 0
    pipeline = polysense.open(place / "clip", device="cpu")
    acts = {line.partition(" = ")[0]: "gelu" for line in pipeline.preset.config.lines() if line.endswith(".act = 'quick_gelu'")}
    assert acts and all(path.startswith("text.") for path in acts)
    other = pipeline.preset.config.but(**acts).build().eval()
    other.load_state_dict(pipeline.system.state_dict())
    text, picture = torch.tensor([[1, 7, 9, 2], [1, 5, 2, 2]]), torch.randint(0, 256, (2, 90, 120, 3), dtype=torch.uint8)
    plan = pipeline.preset.feed.image.but(resample="bilinear")
    with torch.inference_mode():
        save_file({"text": text, "encode_text": 7 * other.encode_text(text)}, tmp_path / "t.safetensors")
        save_file({"picture": picture, "encode_image": other.encode_image(read_images(plan, list(picture.numpy())))}, tmp_path / "p.safetensors")
        save_file({"text": text, "encode_text": other.encode_text(text)}, tmp_path / "act.safetensors")
    words = ["convert", tmp_path / "theirs", tmp_path / "back", "--system", "clip", "--layout", "open_clip", "--check"]
    capsys.readouterr()
    assert run(*words, tmp_path / "act.safetensors") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "the activation gelu" in message and f"--set {min(acts)}=gelu" in message and not (tmp_path / "back").exists()
    assert run(*words, tmp_path / "p.safetensors") == 2 and "bilinear kernel" in " ".join(capsys.readouterr().err.split())
    assert run(*words, tmp_path / "t.safetensors") == 2 and "usual causes" in " ".join(capsys.readouterr().err.split())
    assert run(*words, tmp_path / "act.safetensors", *(w for a in acts for w in ("--set", f"{a}=gelu"))) == 0
    lines = set(polysense.open(tmp_path / "back").preset.config.lines())
    assert all(f"{path} = 'gelu'" in lines for path in acts)
    capsys.readouterr()
    assert run(*words[:2], tmp_path / "bad", *words[3:-1], "--set", "vision.stem=1") == 2


def test_report_is_one_file_with_everything(place, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("zero\none <b>bold</b>\n")
    run("exam", place / "clip", "retrieval", "--data", "digits")
    words = ["--index", place / "photos", "-q", "a five", "-q", "<script>", "--labels", tmp_path / "labels.txt", "--out", tmp_path / "r.html"]
    assert run("report", place / "clip", *words) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 4 and page.count("data:image/jpeg;base64,") > 30
    assert not re.search(r"""(src|href)=(?!["'](data:|#))""", page), "the page loads something from outside"
    assert "<script>" not in page and "<b>bold" not in page and "&lt;script&gt;" in page
    for line in ("a five", "Retrieval on digits", "R@10", "polysense train clip --preset tiny --data digits", "config.text.body.depth = 1"):
        assert line in page


def test_report_of_a_run_that_was_never_examined(tmp_path):
    words = ["batch_size=8", "--data", "digits", "--steps", 1, "--workers", 0]
    assert run("train", "supervised", *words, "--out", tmp_path / "s") == 0
    assert run("report", tmp_path / "s") == 0
    page = (tmp_path / "s" / "report.html").read_text()
    assert "not been examined" in page and "What it finds" not in page


def test_data_get_is_read_back_as_it_was(place, tmp_path, capsys):
    from polysense.data import source

    ours, theirs = source(place / "photos", "all"), source("digits", "test")
    assert len(ours) == 30
    by_name = {s["id"].removesuffix(".png"): s for s in (ours[i] for i in range(30))}
    for i in (0, 13, 29):
        sample = theirs[i]
        twin = next(s for name, s in by_name.items() if name.endswith(sample["id"]))
        assert np.array_equal(np.asarray(twin["image"].convert("RGB")), sample["image"]) and list(twin["captions"]) == sample["captions"]
    assert run("data", "get", "digits", place / "photos") == 2
    assert "not empty" in capsys.readouterr().err


def test_data_show_draws_and_counts(tmp_path, capsys):
    told = said(capsys, "data", "show", "digits", "--split", "test", "-n", 5, "--out", tmp_path / "sheet.png")
    assert told["samples"] == 359 and told["classes"] == 10 and told["captions"].startswith("5.0 a sample")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert sheet.min() < 50 and sheet.shape[1] > 5 * 150


def test_damaged_pictures_are_told_not_fatal(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.png").write_bytes(b"no picture")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,caption\na.png,red\nb.png,damaged\n")
    told = said(capsys, "data", "show", tmp_path / "photos", "--split", "all", "--out", tmp_path / "s.png")
    assert [d["id"] for d in told["damaged"]] and "b.png" in str(told["damaged"])
    told = said(capsys, "data", "get", tmp_path / "photos", tmp_path / "copy", "--split", "all")
    assert told["written"] == 1 and len(told["skipped"]) == 1
