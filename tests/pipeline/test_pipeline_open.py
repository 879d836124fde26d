"""The real thing at toy size: a run folder of CLIP and a published checkpoint, opened and put to work."""
import json

import numpy as np
import pytest
import torch
from colours import paint
from reference import reference

import polysense
from polysense.app.index import NAME, Index, open_index
from polysense.app.search import search
from polysense.base.errors import UserError
from polysense.train.run import train

SMALL = {"config.text.body.depth": 1, "batch_size": 8}
CAPTIONS = ["a red square", "a green square", "a blue square"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One step of CLIP's tiny preset on digits: as good as random, but a real run folder."""
    folder = tmp_path_factory.mktemp("runs") / "clip"
    list(train("clip", data="digits", steps=1, out=folder, overrides=SMALL, device="cpu", workers=0))
    return folder


@pytest.fixture
def photos(tmp_path):
    for i, colour in enumerate(["red", "green", "blue", "white", "black"]):
        paint(tmp_path / "photos" / f"{colour}.jpg", colour, (90, 70), salt=i)
    return tmp_path / "photos"


def test_a_run_folder_opens_and_does_every_verb(run, photos):
    eye = polysense.open(run, device="cpu")
    assert eye.id == "clip" and eye.preset.data == "digits" and not eye.system.training
    paths = sorted(photos.iterdir())
    images, texts = eye.encode(images=paths), eye.encode(texts=CAPTIONS)
    assert images.shape == (5, eye.dim) and texts.shape == (3, eye.dim) and np.isfinite(images).all()
    assert np.allclose(np.linalg.norm(images, axis=1), 1, atol=1e-3)
    with torch.inference_mode():
        exact = eye.system.encode_image(eye.read_images(paths)).numpy()
    assert np.abs(images - exact).max() < 0.03, "bf16 may cost that much, not more"
    assert len(eye.label(paths, CAPTIONS)[0].labels) == 3
    told = eye.explain(paths[0], "a red square")
    assert told.whole.patches.shape == (4, 4) and told.whole.map.shape == (70, 90)
    assert all(0 <= v <= 1 for d in eye.detect(paths[0], ["square"], scales=(1.0,), threshold=0.0) for v in d.box)
    with pytest.raises(UserError, match=r"cannot classify: systems that can classify: .*vit"):
        eye.classify(paths)
    assert polysense.open(run).digest == eye.digest


def test_indexed_in_one_process_searched_in_another(run, photos):
    eye = polysense.open(run, device="cpu")
    with open_index(photos / NAME, eye) as index:
        assert index.update(photos, eye).added == 5
    with Index.open(photos / NAME) as index:
        again = polysense.open(index.model, device="cpu")
        hits = search(index, again, photos / "red.jpg", 3)
        assert hits[0].path.endswith("red.jpg") and hits[0].score > 0.999 and len(hits) == 3
        by_text = search(index, again, "digit seven", 5)
        want = again.similarity([h.path for h in by_text], ["digit seven"])[:, 0]
        assert np.allclose([h.score for h in by_text], want, atol=0.02) and by_text[0].why.whole.map.max() <= 1


def test_a_published_checkpoint_equals_transformers(tmp_path, photos):
    transformers = reference("transformers")
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "max_position_embeddings": 20, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 98},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
                       "patch_size": 8},
        projection_dim=16)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path / "clip")
    eye = polysense.open(tmp_path / "clip", system="clip", layout="hf", device="cpu")
    image, text = torch.randn(3, 3, 32, 32), torch.tensor([[97, 4, 5, 98], [97, 7, 98, 98]])
    with torch.inference_mode():
        out = theirs(pixel_values=image, input_ids=text)
        torch.testing.assert_close(eye.system.encode_image(image), out.image_embeds, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(eye.system.encode_text(text), out.text_embeds, atol=1e-5, rtol=1e-4)
    assert eye.encode(images=sorted(photos.iterdir())).shape == (5, 16)
    with pytest.raises(UserError, match=r"without its tokenizer.*vocab\.json"):
        eye.encode(texts=["a cat"])
    file = polysense.open(tmp_path / "clip" / "model.safetensors", system="clip", layout="hf", device="cpu")
    assert file.digest == eye.digest


def test_wrong_wishes_are_told_in_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text(json.dumps({"system": "clip"}))
    for wish, says in (({"path": run, "system": "slip"}, "is a run of clip, not of slip"),
                       ({"path": tmp_path / "empty", "system": "clip", "layout": "hf"}, "holds no weights"),
                       ({"path": tmp_path / "empty", "system": "clip", "layout": "fairseq"}, "no layout 'fairseq': it has openai, hf, open_clip"),
                       ({"path": tmp_path / "empty", "system": "clipp", "layout": "hf"}, "did you mean clip"),
                       ({"path": tmp_path / "torn"}, r"run\.json cannot be read"),
                       ({"path": tmp_path / "empty"}, "no run.json.*system=.*layout="),
                       ({"path": "owner/name"}, "can only be a hub id.*system="),
                       ({"path": tmp_path / "a" / "b"}, "no run or checkpoint")):
        with pytest.raises(UserError, match=says) as caught:
            polysense.open(**wish)
        assert "\n" not in str(caught.value)
