"""Preset lines, parameter names and shapes, and the first losses are what they were; `make golden` changes them on purpose."""
import importlib.util
from pathlib import Path

import pytest

import polysense

spec = importlib.util.spec_from_file_location("refresh", Path(__file__).with_name("refresh.py"))
refresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refresh)


@pytest.mark.parametrize("name", list(polysense.catalogue()))
def test_nothing_changed_by_accident(name: str):
    assert (refresh.HERE / f"{name}.txt").exists(), "a new system: run `make golden`"
    want, got = refresh.read(name), refresh.golden(name)
    assert list(want) == list(got), "run `make golden` if this was meant"
    for title, lines in want.items():
        if title.startswith("losses"):
            # what rounding on another processor changes doubles with each step (adversarial training shows it first)
            for step, (was, now) in enumerate(zip(lines, got[title], strict=True)):
                assert float(now) == pytest.approx(float(was), rel=2e-3 * 2 ** step), f"{title}, step {step}"
        else:
            assert got[title] == lines, f"{title} changed: run `make golden` if this was meant"


def test_no_golden_file_outlives_its_system():
    assert {p.stem for p in refresh.HERE.glob("*.txt")} == set(polysense.catalogue())
