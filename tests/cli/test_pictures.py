"""The script that draws the pictures of the systems' pages."""
import importlib.util
from pathlib import Path

import pytest
from PIL import Image

import polysense
from polysense.train.run import train

SCRIPT = Path(__file__).parents[2] / "scripts" / "gen_pictures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gen_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_picture_is_drawn_of_a_run_and_says_how_it_was_trained(script, tmp_path):
    list(train("lenet5", steps=3, out=tmp_path / "run", overrides={"batch_size": 8}, workers=0))
    said = script.trained_how(tmp_path / "run")
    assert "3 steps on digits" in said and "million parameters" in said
    script.main(["lenet5", "--run", str(tmp_path / "run"), "--out", str(tmp_path)])
    picture = Image.open(tmp_path / "lenet5.png")
    assert picture.width == script.WIDE and picture.height > 2 * script.SIDE and (tmp_path / "lenet5.png").stat().st_size < 150_000


def test_rows_are_as_high_as_their_words(script):
    square = Image.new("RGB", (8, 8), "red")
    plain, worded = (script.sheet([script.Row("a row", [square] * 6, under)], "foot") for under in ((), ["several words that need two lines"] * 6))
    assert worded.height > plain.height and plain.getpixel((script.LEFT + 5, script.GAP + 5)) == (255, 0, 0)


def test_a_system_that_shows_nothing_is_refused_by_name(script):
    class Silent:
        id = "silent"

        def can(self, capability: str) -> bool:
            return False

    with pytest.raises(SystemExit, match="silent: no kind of picture"):
        script.rows_of(Silent(), "scenes")


def test_special_kinds_are_of_systems_that_exist(script):
    assert set(script.KINDS) <= set(polysense.catalogue())
