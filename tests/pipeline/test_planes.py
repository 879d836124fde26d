"""Maps of distances and heat from files, through a pipeline and `search --depth`."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import polysense
from polysense.app.index import NAME, open_index
from polysense.app.search import search
from polysense.base.errors import UserError
from polysense.base.plan import ImagePlan
from polysense.cli import main
from polysense.data.planes import read_plane, read_planes
from polysense.pipeline import Pipeline

recipe = polysense.load("languagebind")


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    body = recipe.body(16, 1, 2)
    own = recipe.sense(recipe.plane(body, (32, 32), 8, recipe.ThreeChannels.Config(far=10.0)), 12, rank=2)
    of = recipe.LanguageBind.Config(**recipe.clip(32, 8, body, body, 12, vocab=60, length=8, end=2), depth=own)
    preset = recipe.tiny_depth().but(config=of, starts=()).but(**{"feed.image.size": 32})
    return Pipeline(preset.config.build(), preset, id="languagebind", source="run", device="cpu")


def test_numbers_keep_their_meaning(tmp_path):
    metres = np.linspace(0, 12, 24, dtype=np.float32).reshape(4, 6)
    np.save(tmp_path / "a.npy", metres)
    Image.fromarray((metres * 1000).astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).save(tmp_path / "heat.png")
    np.testing.assert_array_equal(read_plane(tmp_path / "a.npy"), metres)
    np.testing.assert_allclose(read_plane(tmp_path / "a.png"), metres, atol=1e-3)
    np.testing.assert_allclose(read_plane(tmp_path / "a.png", "thermal"), metres * 1000 / 65535, atol=1e-4)
    assert read_plane(tmp_path / "heat.png", "thermal").max() == pytest.approx(23 / 255)
    out = read_planes(ImagePlan(size=4), [metres, tmp_path / "a.npy"])
    assert out.shape == (2, 1, 4, 4) and out.dtype == np.float32 and np.array_equal(out[0, 0], metres[:, 1:5])


def test_a_map_is_encoded_as_the_tower_reads_it_and_finds_pictures(pipeline, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    plane = rng.uniform(0, 12, (32, 32)).astype(np.float32)
    np.save(tmp_path / "d.npy", plane)
    with torch.no_grad():
        want = pipeline.system.encode_depth(torch.from_numpy(plane)[None, None]).numpy()
    np.testing.assert_allclose(pipeline.encode_planes([tmp_path / "d.npy"]), want, atol=1e-5)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(photos / f"{name}.png")
    with open_index(photos / NAME, pipeline) as index:
        index.update(photos, pipeline)
        hits = search(index, pipeline, str(tmp_path / "d.npy"), 3, of="depth", why=False)
        cosines = pipeline.encode(images=[h.path for h in hits]) @ want[0]
        np.testing.assert_allclose([h.score for h in hits], cosines, atol=1e-4)
        with pytest.raises(UserError, match=r"cannot encode_thermal|no tower for thermal"):
            search(index, pipeline, str(tmp_path / "d.npy"), 1, of="thermal")
    monkeypatch.setattr("polysense.cli.use._open", lambda *args: pipeline)
    assert main(["search", "--depth", str(tmp_path / "d.npy"), "--index", str(photos), "-m", "run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["depth"].endswith("d.npy") and [h["path"] for h in said["hits"]] == [h.path for h in hits]
    assert main(["search", "red", "--depth", str(tmp_path / "d.npy"), "--index", str(photos)]) == 2
    assert main(["search", "--depth", str(tmp_path / "none.npy"), "--index", str(photos), "-m", "run"]) == 2


def test_what_is_no_map_is_refused_in_one_line(pipeline, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG broken")
    np.save(tmp_path / "nan.npy", np.full((3, 3), np.nan))
    for bad, says in ((tmp_path / "torn.png", "cannot read"), (tmp_path / "none.npy", "cannot read"), (np.zeros((3, 3, 3)), "one channel"),
                      (tmp_path / "nan.npy", "not finite"), (np.zeros((0, 3)), "one channel")):
        with pytest.raises(UserError, match=says) as caught:
            pipeline.encode_planes([bad])
        assert "\n" not in str(caught.value)
