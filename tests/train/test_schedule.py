"""The schedules' values, worked out by hand."""
import pytest

from polysense.base.errors import UserError
from polysense.base.plan import EarlyEnd, Optim
from polysense.train.schedule import SCHEDULES, factor


def values(steps=8, **said):
    return [factor(Optim(lr=1.0, **said), s, steps) for s in range(steps + 1)]


def test_values():
    assert values(4, schedule="constant") == [1] * 5
    assert values(4, schedule="linear", final=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert values(4, schedule="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert values(4, schedule="cosine", final=0.5) == pytest.approx([1, 0.926777, 0.75, 0.573223, 0.5], abs=1e-6)
    assert values(8, schedule="step", milestones=(0.5, 0.75)) == pytest.approx([1, 1, 1, 1, .1, .1, .01, .01, .01])
    assert values(8, schedule="rsqrt", warmup=2) == pytest.approx([.5, 1, 1, (2 / 3) ** .5, .5 ** .5, .4 ** .5, (1 / 3) ** .5, (2 / 7) ** .5, .5])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_never_starts_at_zero_and_reaches_one(schedule):
    assert values(8, schedule=schedule, warmup=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert values(2, schedule=schedule, warmup=10)[1] == 1, "a run shorter than its warm-up still warms up"


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="no schedule 'cosin'"):
        values(schedule="cosin")


def test_a_schedule_may_end_before_its_stage():
    early = EarlyEnd(lr=1.0, final=0.2, schedule="linear", over=0.5)
    assert [factor(early, s, 8) for s in range(9)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2])
