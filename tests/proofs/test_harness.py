"""The verdict of a proof is arithmetic over its seeds, and filing never leaves half a file."""
import json
import sys
from types import ModuleType

import pytest

from polysense.base.errors import UserError
from polysense.proofs.harness import Outcome, gain, prove, verdict


def test_a_proof_is_won_only_against_every_baseline():
    won = [Outcome(0.6, {"a": 0.5, "b": 0.4}), Outcome(0.5, {"a": 0.45, "b": 0.55})]
    assert verdict(won, True)["beats_baseline"] and not verdict(won, False)["beats_baseline"]
    assert not verdict([Outcome(0.6, {"a": 0.5, "b": 0.7})], True)["beats_baseline"]
    assert not verdict([Outcome(0.5, {"a": 0.5})], True)["beats_baseline"], "equal is not better"


def test_the_interval_is_the_paired_student_interval():
    from scipy import stats
    system, base = [0.5, 0.7, 0.6], [0.4, 0.5, 0.55]
    got, gains = gain(system, base, True), [0.1, 0.2, 0.05]
    low, high = stats.t.interval(0.95, 2, loc=sum(gains) / 3, scale=stats.sem(gains))
    assert got["low"] == pytest.approx(low, abs=1e-3) and got["high"] == pytest.approx(high, abs=1e-3)
    assert gain([1.0], [0.5], False) == {"mean": -0.5, "low": None, "high": None}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYSENSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_seeds_are_kept_until_the_code_changes(tmp_path, monkeypatch, cache):
    fake, ran = ModuleType("polysense.proofs.clip"), []
    fake.METRIC, fake.DATA, fake.HIGHER_IS_BETTER = "accuracy", "digits", True
    fake.run = lambda seed: ran.append(seed) or Outcome(0.1 + seed / 3, {"chance": 0.1}, {"a": [seed]})
    monkeypatch.setitem(sys.modules, "polysense.proofs.clip", fake)
    monkeypatch.setattr("polysense.proofs.harness.find_spec", lambda name: True)
    said = []
    first = prove("clip", seeds=(1,), out=None, say=said.append)
    filed = prove("clip", seeds=(0, 1, 2), out=tmp_path, say=said.append)
    assert ran == [1, 0, 2] and filed["system"][1] == first["system"][0] and filed["notes"] == [{"a": [0]}, {"a": [1]}, {"a": [2]}]
    assert [line.endswith("kept)") for line in said] == [False, False, True, False] and first["seconds"] <= filed["seconds"]
    (kept,) = cache.rglob("1.json")
    kept.write_text("{")
    prove("clip", seeds=(0, 1), say=said.append)
    assert ran == [1, 0, 2, 1], "a broken file counts for nothing"
    prove("clip", seeds=(0,), anew=True, say=said.append)
    assert ran == [1, 0, 2, 1, 0]
    monkeypatch.setattr("polysense.proofs.harness.sources", lambda: "other")
    prove("clip", seeds=(0,), say=said.append)
    assert ran == [1, 0, 2, 1, 0, 0], "other code"


def test_the_code_is_known_by_its_text(tmp_path):
    from polysense.proofs import harness
    assert harness.sources() == harness.sources() and len(harness.sources()) == 12


def test_a_filed_proof_has_every_field(tmp_path, monkeypatch):
    fake = ModuleType("polysense.proofs.clip")
    fake.METRIC, fake.DATA, fake.HIGHER_IS_BETTER = "accuracy", "digits", True
    fake.run = lambda seed: Outcome(0.5 + seed / 10, {"chance": 0.1})
    monkeypatch.setitem(sys.modules, "polysense.proofs.clip", fake)
    monkeypatch.setattr("polysense.proofs.harness.find_spec", lambda name: True)
    filed = prove("clip", seeds=(0, 1, 2), out=tmp_path, say=lambda line: None)
    assert json.loads((tmp_path / "clip.json").read_text()) == json.loads(json.dumps(filed))
    wanted = {"id", "commit", "machine", "data", "metric", "higher_is_better", "seeds", "system", "baselines", "beats_baseline", "seconds"}
    assert wanted <= set(filed)
    assert filed["system"] == [0.5, 0.6, 0.7] and filed["baselines"] == {"chance": [0.1] * 3} and filed["beats_baseline"] is True
    fake.run = lambda seed: 1 / 0
    monkeypatch.setattr("polysense.proofs.harness.sources", lambda: "other")
    with pytest.raises(ZeroDivisionError):
        prove("clip", seeds=(0,), out=tmp_path, say=lambda line: None)
    assert json.loads((tmp_path / "clip.json").read_text())["system"] == [0.5, 0.6, 0.7], "a crash leaves the older file"


def test_systems_without_a_proof_or_a_name_are_refused():
    with pytest.raises(UserError, match="no system"):
        prove("no_such_thing")
    with pytest.raises(UserError, match="at least one seed"):
        prove("clip", seeds=())
