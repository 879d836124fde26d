"""Checkpoints: whole or absent, checked when read, random states and all."""
import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from train.toys import toy

from polysense.base.errors import UserError
from polysense.train import checkpoint
from polysense.train.parallel import World


def save(root, step, **tensors):
    return checkpoint.save(root, step, tensors or {"model.w": torch.full((3,), float(step))}, {"stage": 0, "index": step}, World())


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000002", "000000010"]
    found = checkpoint.latest(tmp_path)
    assert found.step == 10 and found.facts["stage"] == 0
    assert torch.equal(checkpoint.load_tensors(found, {}, World())["model.w"], torch.full((3,), 10.0))


def damage_cut(path):
    data = (path / checkpoint.TENSORS).read_bytes()
    (path / checkpoint.TENSORS).write_bytes(data[:-3])


def damage_bit(path):
    data = bytearray((path / checkpoint.TENSORS).read_bytes())
    data[-1] ^= 1
    (path / checkpoint.TENSORS).write_bytes(bytes(data))


def damage_facts(path):
    text = (path / checkpoint.FACTS).read_text()
    (path / checkpoint.FACTS).write_text(text.replace('\\"index\\": 2', '\\"index\\": 7'))
    assert (path / checkpoint.FACTS).read_text() != text


def damage_empty(path):
    (path / checkpoint.FACTS).write_text("")


def damage_missing(path):
    (path / "rank0.json").unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_facts, damage_empty, damage_missing])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    said = []
    assert checkpoint.latest(tmp_path, said.append).step == 1
    assert len(said) == 1 and "000000002 is damaged" in said[0] and "going on from 000000001" in said[0]


def test_when_all_are_damaged_it_refuses(tmp_path):
    damage_cut(save(tmp_path, 2))
    with pytest.raises(UserError, match=r"state\.safetensors is not what was written"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_an_unfinished_write_is_invisible(tmp_path):
    whole = save(tmp_path, 1)
    shutil.copytree(whole, tmp_path / ".000000002.part")
    assert checkpoint.latest(tmp_path).step == 1
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path).step == 2 and not (tmp_path / ".000000002.part").exists()


def test_weights_that_are_not_numbers_are_never_written(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"model\.w holds values that are not finite"):
        save(tmp_path, 2, **{"model.a": torch.ones(2), "model.w": torch.tensor([1.0, float("nan")])})
    assert [p.name for p in tmp_path.iterdir()] == ["000000001"]


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 2)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.write_tensors(tmp_path / "w.safetensors", {"w": torch.ones(2)})
    assert checkpoint.latest(tmp_path).step == 1 and not (tmp_path / "w.safetensors").exists()


def test_random_states_go_round_through_json():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    np.random.standard_normal()  # noqa: NPY002

    def draw():
        return random.random(), np.random.standard_normal(2).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    states = json.loads(json.dumps(checkpoint.random_states()))
    want = draw()
    assert draw() != want
    checkpoint.set_random_states(states)
    assert draw() == want


def test_tied_weights_are_stored_under_both_names(tmp_path):
    w = torch.ones(2, 2)
    save(tmp_path, 1, **{"model.a": w, "model.b": w, "model.c": w.T})
    assert checkpoint.load_tensors(checkpoint.latest(tmp_path), {}, World()).keys() == {"model.a", "model.b", "model.c"}


def test_weights_that_do_not_fit_are_named(tmp_path):
    system = toy()
    save(tmp_path, 1, **{f"model.{k}": v for k, v in system.state_dict().items()})
    with pytest.raises(UserError, match="does not fit the system"):
        checkpoint.load_model(checkpoint.latest(tmp_path), toy(width=16), World())
    twin = toy(seed=5)
    checkpoint.load_model(checkpoint.latest(tmp_path), twin, World())
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in system.state_dict().items())
