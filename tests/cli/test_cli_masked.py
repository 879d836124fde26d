"""reconstruct with a masked model: as read, as shown to it, as drawn."""
import json

import numpy as np
import pytest
from PIL import Image

import polysense
from polysense.base.errors import UserError
from polysense.cli import main


def run(*words: object) -> int:
    return main([str(w) for w in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of two steps in mae/ and two pictures in photos/."""
    place = tmp_path_factory.mktemp("masked")
    assert run("train", "mae", "encoder.body.width=16", "encoder.body.depth=1", "decoder.body.width=12", "decoder.body.depth=1", "batch_size=8",
               "--data", "digits", "--steps", 2, "--out", place / "mae", "--workers", 0) == 0
    assert run("data", "get", "digits", place / "photos", "--split", "test", "-n", 2) == 0
    return place


def test_the_sheet_has_what_was_read_shown_and_drawn(place, tmp_path, capsys):
    sheets = []
    for seed in (0, 0, 1):
        capsys.readouterr()
        assert run("reconstruct", place / "photos", "-m", place / "mae", "--out", tmp_path / "a.png", "--seed", seed, "--json") == 0
        assert len(json.loads(capsys.readouterr().out)["pictures"]) == 2
        sheets.append(np.asarray(Image.open(tmp_path / "a.png")))
    assert sheets[0].shape == (3 * 64, 2 * 64, 3) and np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])
    read, shown, drawn = sheets[0].reshape(3, 8, 8, 16, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    kept = (read == shown).all((2, 3, 4))
    assert np.array_equal(read[kept], drawn[kept]), "what is visible stays"
    assert kept.sum() >= 2 * 16


def test_the_pipeline_encodes_and_draws_files(place, tmp_path):
    pipeline = polysense.open(place / "mae")
    files = sorted((place / "photos").rglob("*.png"))
    assert pipeline.encode(images=files).shape == (2, 16) and len(pipeline.reconstruct(files)) == 2
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:60])
    with pytest.raises(UserError, match="cannot read the picture"):
        pipeline.reconstruct([tmp_path / "cut.png"])


def test_a_preset_of_clips_is_trained_and_the_way_on_is_that_of_clips(tmp_path, capsys):
    assert run("train", "maskfeat", "--preset", "tiny_video", "encoder.base=8", "encoder.depth=2", "encoder.doubled=(1,)", "batch_size=4",
               "--data", "scenes:clips?size=32&frames=16&n=20", "--steps", 2, "--out", tmp_path / "m", "--workers", 0) == 0
    assert "polysense encode VIDEOS -m" in capsys.readouterr().err
    assert run("train", "maskfeat", "encoder.body.width=12", "encoder.body.depth=1", "batch_size=4", "--data", "scenes:clips?size=64&n=20",
               "--steps", 1, "--out", tmp_path / "p", "--workers", 0) == 0
    assert "polysense encode PHOTOS -m" in capsys.readouterr().err, "pictures of clips train the preset of pictures"
