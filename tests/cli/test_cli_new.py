"""`polysense new`: a skeleton stands in the catalogue at once, runs, and fails the contract where it is unfilled."""
import importlib.util

import pytest

from polysense.base.catalogue import catalogue
from polysense.base.plan import Preset
from polysense.cli import main


@pytest.fixture
def skeleton(tmp_path, capsys):
    (tmp_path / "systems").mkdir()
    assert main(["new", "blip9", "--family", "fuse", "--into", str(tmp_path / "systems")]) == 0
    path = tmp_path / "systems" / "fuse" / "blip9.py"
    assert str(path) in capsys.readouterr().out
    return path


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_stands_in_the_catalogue(skeleton):
    card = catalogue(skeleton.parents[1])["blip9"]
    assert (card.family, card.presets, card.needs, card.can) == ("fuse", ("tiny", "paper"), ("image",), ("encode_image",))


def test_it_imports_and_builds(skeleton):
    module = module_of(skeleton)
    preset = module.tiny()
    assert isinstance(preset, Preset) and preset.data
    assert type(preset.config.build()) is module.Blip9


def test_it_fails_its_contract_until_filled(skeleton):
    import torch

    module = module_of(skeleton)
    system = module.tiny().config.build()
    assert not module.card.says and not module.card.paper and not module.PARAMETERS        # test_card_is_complete, the paper's size
    assert not system.losses({"image": torch.randn(2, 3, 64, 64)})                         # an objective without a loss
    assert not torch.allclose(system.encode_image(torch.randn(2, 3, 64, 64)).norm(dim=-1), torch.ones(2))


def test_it_passes_the_linter(skeleton):
    import subprocess
    import sys
    from pathlib import Path

    config = Path(__file__).parents[2] / "pyproject.toml"
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(config), str(skeleton)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_taken_and_malformed_names_are_refused(skeleton, capsys):
    root = str(skeleton.parents[1])
    for words in (["new", "blip9", "--family", "fuse", "--into", root], ["new", "clip", "--into", root], ["new", "9x", "--into", root],
                  ["new", "fine", "--family", "../up", "--into", root], ["new", "fine", "--into", root + "/none"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert list(catalogue.__wrapped__(skeleton.parents[1])) == ["blip9"]
