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
    (("-m", "RUN", "--sampler", "heun"), "ddpm"), (("  ", "-m", "RUN"), "empty"),
    (("-m", "RUN", "--strength", "0.5"), "no control net"), (("-m", "RUN", "--guess"), "no control net")], ids=range(11))
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


@pytest.fixture(scope="module")
def painter():
    """A text-to-image system with a tokenizer, untrained."""
    import torch

    from polysense.archetypes.stable_diffusion import unet
    from polysense.base.catalogue import preset_of
    from polysense.data.tokenizer import make_tokenizer
    from polysense.decoders.kl_vae import KLVAE
    from polysense.nn.norm import GroupNorm
    from polysense.pipeline import Pipeline
    torch.manual_seed(0)
    base = preset_of("latent_diffusion")
    preset = base.but(config=base.config.but(
        vae=KLVAE.Config(widths=(8, 16), depth=1, norm=GroupNorm.Config(groups=4, eps=1e-6)), size=16,
        unet=unet((16, 32), (0,), 192, depth=1, heads=2, groups=8))).but(**{"feed.image.size": 16})
    return Pipeline(preset.config.build(), preset, make_tokenizer(preset.feed.text, ["a red circle", "a blue star"]), id="latent_diffusion")


def test_words_become_pictures(painter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(polysense, "open", lambda *a, **k: painter)
    words = ["generate", "a red circle", "a blue star", "-m", "any", "-n", "2", "--steps", "2", "--guidance", "3", "--out",
             str(tmp_path / "a.png"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == ["a red circle", "a blue star"]
    assert Image.open(tmp_path / "a.png").size == (34, 34), "a row for each text"
    assert main(["generate", "-m", "any"]) == 2 and "what it is told" in capsys.readouterr().err
    assert main(["generate", "a red circle", "-m", "any", "--steps", "2", "--hint", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]) == 2
    assert "does not hear 'hint'" in capsys.readouterr().err


def test_guidance_reaches_the_system(painter):
    one, two = (painter.generate("a red circle", steps=2, guidance=g)[0] for g in (1.0, 8.0))
    assert painter.generate("a red circle", steps=2, guidance=8.0)[0].tobytes() == two.tobytes() and one.size == (16, 16)


def test_how_a_map_is_followed_reaches_the_system(tmp_path, monkeypatch, capsys):
    """Through a stand-in for the system, which keeps what it hears."""
    import torch

    from polysense.base.catalogue import preset_of
    from polysense.data.tokenizer import make_tokenizer
    from polysense.pipeline import Pipeline

    class Stand(torch.nn.Module):
        hears, kinds, heard = ("hint", "strength", "guess", "weighting"), 2, list[dict]()

        def generate_image(self, text, *, steps, **control):
            self.heard.append(control)
            return torch.zeros(len(text), 3, 8, 8)

    stand, preset = Stand(), preset_of("controlnet").but(**{"feed.image.size": 8})
    pipeline = Pipeline(stand, preset, make_tokenizer(preset.feed.text, ["a red circle"]), id="controlnet")
    monkeypatch.setattr(polysense, "open", lambda *a, **k: pipeline)
    monkeypatch.setattr(Pipeline, "can", lambda self, capability: capability == "generate_image")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "map.png")
    words = ["-m", "any", "-n", "1", "--hint", str(tmp_path / "map.png"), "--hint", str(tmp_path / "map.png"), "--out", str(tmp_path / "a.png")]
    assert main(["generate", "a red circle", *words, "--strength", "0.5", "--strength", "2", "--weighting"]) == 0
    assert stand.heard[-1]["strength"].tolist() == [0.5, 2.0] and bool(stand.heard[-1]["weighting"]) and "guess" not in stand.heard[-1]
    assert stand.heard[-1]["hint"].shape == (1, 6, 8, 8)
    assert main(["generate", *words, "--guess", "--strength", "0.5"]) == 0, "no words needed"
    assert bool(stand.heard[-1]["guess"]) and stand.heard[-1]["strength"].tolist() == 0.5 and "weighting" not in stand.heard[-1]
    capsys.readouterr()
    assert main(["generate", "a red circle", *words, *(["--strength", "1"] * 3)]) == 2
    shown = capsys.readouterr().err.strip()
    assert "3 strengths for 2 kinds of map" in shown and "\n" not in shown
