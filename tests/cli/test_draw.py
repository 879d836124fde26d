"""polysense generate: from a run folder to PNG files."""
import json

import numpy as np
import pytest
from PIL import Image

import polysense
from polysense.cli import main
from polysense.train.run import train

SMALL = {"config.unet.levels.0.width": 8, "config.unet.levels.1.width": 16, "config.size": 8, "feed.image.size": 8, "feed.train_image.size": 8,
         "stages.0.steps": 3, "stages.0.batch_size": 4, "stages.0.ema": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("draw") / "ddpm"
    list(train("ddpm", data="scenes:single?n=16&size=16", out=place, overrides=SMALL))
    return place


def test_a_sheet_and_each_picture(run, tmp_path, capsys):
    words = ["generate", "-m", str(run), "-n", "5", "--steps", "2", "--seed", "3", "--out", str(tmp_path / "a.png"),
             "--each", str(tmp_path / "all"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == 5 and Image.open(tmp_path / "a.png").size == (18, 28), "two columns and three rows of 8, two apart"
    each = [np.asarray(Image.open(p)) for p in told["each"]]
    assert len(each) == 5 and all(p.shape == (8, 8, 3) for p in each)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png"))[:8, 10:18], each[1])
    assert main([*words[:8], "4", *words[9:]]) == 0
    assert not np.array_equal(np.asarray(Image.open(told["each"][0])), each[0]), "another seed, other pictures"


def test_the_average_of_the_weights_draws(run):
    from safetensors.torch import load_file
    opened = polysense.open(run).system.state_dict()
    average, last = load_file(run / "weights_ema.safetensors"), load_file(run / "weights.safetensors")
    name = "unet.conv_in.weight"
    assert (opened[name] == average[name]).all() and not (opened[name] == last[name]).all()


def test_equal_seeds_draw_equal_pictures_whatever_happened_before(run):
    pipeline = polysense.open(run)
    one = pipeline.generate(count=3, steps=2, seed=1)
    np.random.default_rng().normal()
    two = pipeline.generate(count=3, steps=2, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    fast = pipeline.generate(count=3, steps=2, seed=1, sampler="dpm")
    assert not np.array_equal(one[0], fast[0]) and pipeline.system.sampler.name == "ddpm"


@pytest.mark.parametrize("words, said", [
    ((), "-m"), (("-m", "nowhere"), "nowhere"), (("a circle", "-m", "RUN"), "without words"), (("-m", "RUN", "--guidance", "4"), "without words"),
    (("-m", "RUN", "--out", "x.gif"), ".png"), (("-m", "RUN", "--steps", "2000"), "between 1 and 1000"),
    (("-m", "RUN", "--hint", "no.png"), "no.png"),
    (("-m", "RUN", "--sampler", "heun"), "ddpm"), (("  ", "-m", "RUN"), "empty")], ids=range(9))
def test_mistakes_get_one_line(run, words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *(str(run) if w == "RUN" else w for w in words)]) == 2
    shown = capsys.readouterr().err.strip()
    assert said in shown and "\n" not in shown and not list(tmp_path.iterdir())


def test_damaged_weights_are_said(run, tmp_path, capsys):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file
    place = tmp_path / "bad"
    shutil.copytree(run, place)
    state = load_file(place / "weights_ema.safetensors")
    state["unet.conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, place / "weights_ema.safetensors")
    assert main(["generate", "-m", str(place), "--steps", "2", "--out", str(tmp_path / "x.png")]) == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "x.png").exists()
