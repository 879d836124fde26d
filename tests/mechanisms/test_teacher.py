"""The moving copy: exact recursions, nothing that trains, files."""
import pytest
import torch
from torch import nn

from polysense.base.errors import UserError
from polysense.mechanisms.teacher import Teacher


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_after_t_steps_of_a_still_student_it_has_the_closed_form():
    one, m = student(), 0.9
    teacher = Teacher.Config(momentum=m).of(one)
    before = teacher.module[0].weight.clone()
    with torch.no_grad():
        one[0].weight.normal_()
    for _ in range(7):
        teacher.move(one, 0.3)
    torch.testing.assert_close(teacher.module[0].weight, m ** 7 * before + (1 - m ** 7) * one[0].weight)


def test_momentum_one_never_moves_and_zero_copies():
    one = student()
    still, live = (Teacher.Config(momentum=m).of(one) for m in (1.0, 0.0))
    before = still.module[2].bias.clone()
    with torch.no_grad():
        one[2].bias.add_(1)
    still.move(one, 0.5)
    live.move(one, 0.5)
    assert torch.equal(still.module[2].bias, before) and torch.equal(live.module[2].bias, one[2].bias)


def test_cosine_momentum_rises_from_first_to_final():
    teacher = Teacher.Config(momentum=0.9, final=1.0).of(student())
    values = [teacher.momentum(p / 10) for p in range(11)]
    assert values[0] == pytest.approx(0.9) and values[5] == pytest.approx(0.95) and values[-1] == 1.0 and values == sorted(values)


def test_nothing_of_it_can_be_trained_and_no_graph_is_kept():
    one = student()
    teacher = Teacher.Config().of(one)
    assert not list(teacher.parameters()) and not teacher(torch.randn(5, 3)).requires_grad
    assert {n.removeprefix("module.") for n in teacher.state_dict()} == set(one.state_dict())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(teacher.module.buffers(), one.parameters()))


def test_parameters_are_averaged_and_running_statistics_are_its_own():
    one = student()
    teacher = Teacher.Config(momentum=0.0).of(one)
    one.train()(torch.randn(9, 3) + 5)
    teacher.move(one, 0.0)
    assert torch.equal(teacher.module[1].weight, one[1].weight) and not torch.equal(teacher.module[1].running_mean, one[1].running_mean)
    teacher.refresh(one)
    assert torch.equal(teacher.module[1].running_mean, one[1].running_mean)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mode_says_how_its_norms_behave_in_training(mode):
    teacher = Teacher.Config(mode=mode).of(student()).train()
    assert teacher.module[1].training == (mode == "train") and not teacher.eval().module[1].training


def test_it_survives_a_state_dict():
    one = student()
    teacher, twin = (Teacher.Config(momentum=0.5).of(one) for _ in range(2))
    with torch.no_grad():
        one[0].weight.normal_()
    teacher.move(one, 0.0)
    twin.load_state_dict(teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrong", [{"momentum": 1.2}, {"final": -0.1}, {"mode": "half"}])
def test_impossible_teachers_are_refused(wrong):
    with pytest.raises(UserError, match="no teacher"):
        Teacher.Config(**wrong).of(student())
