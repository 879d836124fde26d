import http.server
import threading
from functools import partial

import numpy as np
import pytest
import torch
from colours import RGB, Blind, paint, pipeline, preset, tokenizer
from PIL import Image

from polysense.base.errors import UserError
from polysense.base.system import ImagePlan
from polysense.pipeline import Pipeline, grid_boxes, open_pipeline, overlay
from polysense.pipeline.heat import content_words


def scene(*patches: tuple[str, tuple[int, int, int, int]], size=(96, 96), ground=(128, 128, 128)) -> Image.Image:
    """Coloured rectangles (x0 y0 x1 y1 in pixels) on grey."""
    array = np.zeros((size[1], size[0], 3), np.uint8) + np.array(ground, np.uint8)
    for colour, (x0, y0, x1, y1) in patches:
        array[y0:y1, x0:x1] = RGB[colour]
    return Image.fromarray(array)


def blind() -> Pipeline:
    plan = preset(Blind.Config())
    return Pipeline(plan.config.build(), plan, tokenizer, id="blind", device="cpu")


def test_paths_pictures_arrays_and_addresses_give_the_same_features(tmp_path):
    eye, path = pipeline(), paint(tmp_path / "a b.png", "red")
    serve = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=serve.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{serve.server_port}/a%20b.png"
        picture = Image.open(path)
        features = eye.encode(images=[path, str(path), picture, np.asarray(picture), address])
        with pytest.raises(UserError, match=r"missing\.png"):
            eye.encode(images=[address.replace("a%20b", "missing")])
    finally:
        serve.shutdown()
    assert features.shape == (5, 4) and features.dtype == np.float32 and np.allclose(features, features[0])
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert np.array_equal(eye.encode(images=path), features[:1]), "a single picture counts as a list of one"


def test_encoding_in_batches_changes_nothing_and_tells_progress(tmp_path):
    eye, told = pipeline(), []
    paths = [paint(tmp_path / f"{i}.png", (i * 30, 200 - i * 20, 90)) for i in range(7)]
    whole = eye.encode(images=paths)
    assert np.allclose(eye.encode(images=paths, batch_size=3, progress=lambda *p: told.append(p)), whole, atol=1e-6)
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert eye.encode(texts=["red", "a blue thing"]).shape == (2, 4)
    for wrong in ({}, {"images": paths, "texts": ["red"]}, {"images": []}, {"texts": []}):
        with pytest.raises(UserError):
            eye.encode(**wrong)


def test_encoding_leaves_no_graph_and_the_system_in_eval_mode():
    eye = pipeline()
    eye.system.register_forward_hook(lambda *_: None)
    seen = []
    inner = eye.system.encode_image
    eye.system.encode_image = lambda image: seen.append((torch.is_inference_mode_enabled(), eye.system.training)) or inner(image)
    eye.encode(images=[scene()])
    assert seen == [(True, False)]


def test_similarity_and_labels(tmp_path):
    eye = pipeline()
    paths = [paint(tmp_path / f"{c}.png", c) for c in ("red", "green", "blue")]
    assert (eye.similarity(paths, ["red", "green", "blue"]).argmax(1) == [0, 1, 2]).all()
    told = eye.label(paths, ["blue", "red", "green"], top=2)
    assert [t.labels[0][0] for t in told] == ["red", "green", "blue"] and [t.path for t in told] == [str(p) for p in paths]
    assert all(len(t.labels) == 2 and 1 >= t.labels[0][1] >= t.labels[1][1] for t in told)
    every = eye.label(paths[0], ["blue", "red", "green"])[0]
    assert abs(sum(p for _, p in every.labels) - 1) < 1e-5
    cosines = eye.similarity(paths[:1], ["blue", "red", "green"])[0]
    want = np.exp(20 * cosines) / np.exp(20 * cosines).sum()
    assert np.allclose([dict(every.labels)[n] for n in ("blue", "red", "green")], want, atol=1e-5)
    assert every.to_json()["labels"][0]["label"] == "red"


def test_templates_are_averaged_and_normalised_again():
    eye = pipeline()
    rows = eye.prompts(["red", "blue"], ["a {}.", "a white {} thing"])
    first, second = eye.encode(texts=["a red.", "a white red thing"])
    want = (first + second) / 2
    assert np.allclose(rows[0], want / np.linalg.norm(want), atol=1e-6)
    assert np.allclose(eye.prompts(["red"], ["{}"]), eye.encode(texts=["red"]), atol=1e-6), "one template is no ensemble"
    with pytest.raises(UserError, match=r"needs \{\} where"):
        eye.prompts(["red"], ["a photo"])
    with pytest.raises(UserError, match="no labels"):
        eye.prompts([])


def test_damaged_weights_are_told_not_stored():
    eye = pipeline(gain=float("nan"))
    with pytest.raises(UserError, match="not finite"):
        eye.encode(images=[scene()])


def test_classify():
    eye = pipeline()
    (told,) = eye.classify([scene(("green", (0, 0, 96, 96)))], ["red", "green", "blue"])
    assert told.labels[0][0] == "green" and told.path == "#0"
    assert eye.classify([scene(("green", (0, 0, 96, 96)))])[0].labels[0][0] == "1"
    with pytest.raises(UserError, match="knows 3 classes"):
        eye.classify([scene()], ["one"])


@pytest.mark.parametrize(("x", "y"), [(0, 0), (3, 1), (2, 3)])
def test_the_heat_finds_the_right_patch(x, y):
    eye = pipeline(grid=4)
    picture = scene(("red", (24 * x, 24 * y, 24 * x + 24, 24 * y + 24)), ("blue", (24 * (3 - x), 24 * (3 - y), 24 * (4 - x), 24 * (4 - y))))
    told = eye.explain(picture, "a red thing and a blue one")
    heat = {h.word: h for h in told.words}
    for word, column, row in (("red", x, y), ("blue", 3 - x, 3 - y)):
        assert np.unravel_index(heat[word].patches.argmax(), (4, 4)) == (row, column)
        px, py = heat[word].peak
        assert abs(px - (column + 0.5) / 4) < 0.13 and abs(py - (row + 0.5) / 4) < 0.13
        inside = heat[word].map[24 * row + 6:24 * row + 18, 24 * column + 6:24 * column + 18].mean()
        assert inside > 0.8 and heat[word].map.mean() < 0.5
        assert heat[word].map.shape == (96, 96) and heat[word].map.min() >= 0 and heat[word].map.max() <= 1
    assert "thing" not in heat, "a word that says nothing does not match"
    assert told.to_json()["words"][0].keys() == {"word", "score", "share", "peak"}
    assert abs(heat["red"].share - 1 / 16) < 1e-6 and abs(heat["blue"].share - 1 / 16) < 1e-6


def test_words_that_do_not_match_are_left_out_and_the_best_comes_first():
    told = pipeline().explain(scene(("red", (0, 0, 90, 96))), "a red ball, green grass and a yellow sun")
    assert told.words[0].word == "red" and "green" not in [h.word for h in told.words]


def test_outside_the_crop_there_is_no_heat():
    eye = pipeline(fit="crop")
    told = eye.explain(scene(("red", (75, 0, 99, 24)), ("red", (0, 0, 20, 96)), size=(192, 96)), "red")
    assert told.image.size == (192, 96) and told.whole.map.shape == (96, 192)
    assert told.whole.map[:, :48].max() == 0 and told.whole.map[:, 144:].max() == 0, "the feed cut these parts off: nothing was looked at there"
    px, py = told.whole.peak
    assert 72 <= px * 192 <= 100 and py * 96 <= 26


def test_a_feature_can_be_explained_too_and_large_pictures_are_drawn_small():
    eye = pipeline()
    told = eye.explain(scene(("green", (0, 500, 700, 1000)), size=(1400, 1000)), eye.encode(images=[scene(("green", (0, 0, 96, 96)))])[0])
    px, py = told.whole.peak
    assert told.image.size == (512, 366) and px < 0.5 and py > 0.5 and told.words == ()


def test_overlay_keeps_the_size_and_colours_only_where_it_is_hot():
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    drawn = np.asarray(overlay(scene(("green", (0, 0, 96, 96))), heat)).astype(int)
    assert drawn.shape == (96, 96, 3)
    assert np.ptp(drawn[90, 90]) == 0, "cold places are grey"
    assert np.ptp(drawn[5, 5]) > 60 and drawn[5, 5].sum() > drawn[90, 90].sum()


def test_content_words():
    assert content_words("A photo of two dogs' and a Two-seat car, on THE grass!") == ["two", "dogs", "two-seat", "car", "grass"]
    assert content_words("一只 猫 über café") == ["一只", "猫", "über", "café"]


def test_detect_finds_the_boxes_once_each():
    eye = pipeline()
    picture = scene(("red", (0, 0, 48, 48)), ("red", (96, 96, 144, 144)), ("blue", (96, 0, 144, 48)), size=(144, 144))
    found = eye.detect(picture, ["red", "blue"], scales=(1.0, 1 / 3), backgrounds=("grey", "nothing"), threshold=0.6, iou=0.2)
    assert sorted((d.label, *np.round(d.box, 2).tolist()) for d in found) == [
        ("blue", 0.67, 0.0, 1.0, 0.33), ("red", 0.0, 0.0, 0.33, 0.33), ("red", 0.67, 0.67, 1.0, 1.0)]
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    assert eye.detect(scene(), ["red", "blue"], backgrounds=("grey",)) == []
    assert eye.detect(picture, ["red"], threshold=1.1) == []


def test_suppression_works_within_a_label_only():
    eye = pipeline()
    picture = scene(("red", (0, 0, 96, 48)), ("blue", (0, 48, 96, 96)))
    both = eye.detect(picture, ["red", "blue"], scales=(1.0,), backgrounds=(), threshold=0.0)
    assert {d.label for d in both} == {"red", "blue"}


@pytest.mark.parametrize("size", [(100, 100), (300, 100), (33, 70), (1, 1)])
def test_grid_boxes_cover_the_picture(size):
    seen = np.zeros((size[1], size[0]), int)
    boxes = grid_boxes(size, (0.5, 0.25)).astype(int)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] and x1 - x0 == y1 - y0
        seen[y0:y1, x0:x1] += 1
    assert seen.min() >= 1 and len({tuple(b) for b in boxes}) == len(boxes)


def test_what_a_system_cannot_do_is_told_with_those_that_can(monkeypatch):
    from polysense.base.card import Card
    cards = {"seer": Card(name="Seer", paper="", year=2000, says="", can=("encode_image", "encode_patches", "classify"), id="seer")}
    monkeypatch.setattr("polysense.pipeline.catalogue", lambda: cards)
    deaf = blind()
    assert deaf.encode(texts=["red"]).shape == (1, 4)
    for act in (lambda: deaf.encode(images=[scene()]), lambda: deaf.classify([scene()]), lambda: deaf.explain(scene(), "red"),
                lambda: deaf.label([scene()], ["red"])):
        with pytest.raises(UserError, match=r"blind cannot \w+: systems that can \w+: seer"):
            act()
    plan = preset(Blind.Config())
    mute = Pipeline(plan.config.build(), plan.but(**{"feed.image": None}), None, id="mute", device="cpu")
    with pytest.raises(UserError, match="does not read pictures"):
        mute.read_images([scene()])
    with pytest.raises(UserError, match="does not read text"):
        mute.read_texts(["red"])


def test_the_digest_names_weights_and_feed():
    one = pipeline()
    assert one.digest == pipeline().digest and len(one.digest) == 16
    assert one.digest != pipeline(gain=0.5).digest and one.digest != pipeline(fit="crop").digest
    assert one.dim == 4 and one.scale == 20.0


def test_opening_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no run or checkpoint"):
        open_pipeline(tmp_path / "nowhere")
    (tmp_path / "some").mkdir()
    with pytest.raises(UserError, match="system="):
        open_pipeline(tmp_path / "some")
    with pytest.raises(UserError, match="no device"):
        Pipeline(blind().system, preset(Blind.Config()), device="abacus")


def test_hub_names_and_paths(monkeypatch):
    import huggingface_hub
    asked = []

    def refuse(name, revision=None, allow_patterns=None):
        asked.append((name, revision))
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    from polysense.weights.files import download
    with pytest.raises(UserError, match=r"no network.*give a local folder"):
        download("openai/clip-vit-base-patch32@abc")
    assert asked == [("openai/clip-vit-base-patch32", "abc")]


def test_a_subject_as_exams_see_it(tmp_path):
    eye = pipeline()
    images, texts = eye.read_images([paint(tmp_path / "r.png", "red"), scene()]), eye.read_texts(["red", "a blue and red"])
    size = eye.preset.feed.image.size
    assert isinstance(eye.preset.feed.image, ImagePlan) and images.shape == (2, 3, size, size) and texts.shape == (2, 2)
    assert images.device == texts.device == eye.device and texts.dtype == torch.int64
