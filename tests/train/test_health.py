"""A run that collapses says so, once, in words, and its log holds the numbers."""
import pytest
import torch
from train.toys import Toy, ToyFeeding, preset_of

from polysense.app.report import curves, read_log
from polysense.train.events import Noted
from polysense.train.health import LOOKS, Watch
from polysense.train.run import train_preset

WELL = {"feature_spread": 0.9, "effective_rank": 20.0, "teacher_entropy": 2.0, "teacher_certainty": 3.0, "answers_used": 60.0, "share_of_codes": 0.5,
        "codes_used": 128.0}


@pytest.mark.parametrize("ill, says", [
    ({"feature_spread": 0.01}, "spread of the features is 0.01"), ({"effective_rank": 1.1}, "1.1 dimensions"),
    ({"teacher_entropy": 0.02, "answers_used": 1.01}, "the teacher's entropy is 0.02"), ({"teacher_certainty": 0.001}, "uniform answer"),
    ({"share_of_codes": 0.01, "codes_used": 2.5}, "2.5 codes")])
def test_each_sign_is_said_once_after_several_looks_and_again_after_a_recovery(ill, says):
    watch = Watch()
    said = [watch.say(WELL | ill) for _ in range(2 * LOOKS)]
    assert [bool(s) for s in said] == [i == LOOKS - 1 for i in range(2 * LOOKS)] and says in said[LOOKS - 1][0]
    assert not watch.say(WELL)
    assert any([watch.say(WELL | ill) for _ in range(LOOKS)])


def test_a_sure_teacher_that_says_different_things_is_well_and_unknown_numbers_are_passed_over():
    watch = Watch()
    assert not any(watch.say(WELL | {"teacher_entropy": 0.02}) + watch.say({"loss_of_hair": 1.0}) for _ in range(9))


def test_the_log_the_note_and_the_report_of_a_collapse(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "health", lambda self, keep: {"feature_spread": 0.5 / self.seen, "effective_rank": torch.tensor(float("nan"))})
    plan = preset_of()
    plan = plan.but(stages=(plan.stages[0].but(steps=45),))
    events = list(train_preset("toy", plan, ("image", "text"), out=tmp_path / "run", feeding=ToyFeeding(), device="cpu", log_every=3))
    log = read_log(tmp_path / "run" / "log.jsonl")
    looks = {s["step"]: s["health"] for s in log if "health" in s}
    assert list(looks) == [12, 21, 30, 42, 45] and looks[12] == {"feature_spread": pytest.approx(0.05)}, "each look is in the next line"
    notes = [e.text for e in events if isinstance(e, Noted)]
    assert notes == ["step 30: the spread of the features is 0.017 where 1 is healthy: collapsing onto one point"]
    assert "feature spread" in curves(log) and "effective rank" not in curves(log)
