"""Two processes against one: the same loss curve from the same global batch, however the work is shared."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.ranks import WAYS, curve
from train.toys import preset_of, toy

from polysense.base.errors import UserError
from polysense.train.parallel import SyncNorm, World, pick_device, synchronise_norms, total_norm
from polysense.train.run import load_run


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(Path(__file__).with_name("ranks.py")), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out / "curves.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_take_the_steps_of_one(together, tmp_path, way):
    out, curves = together
    alone = curve(way, tmp_path, "ddp")
    assert len(alone) == 6
    for (a, norm_a), (b, norm_b) in zip(alone, curves[way]):
        assert b == pytest.approx(a, abs=1e-5) and norm_b == pytest.approx(norm_a, rel=1e-4, abs=1e-5)
    one, two = load_file(tmp_path / way / "weights.safetensors"), load_file(out / way / "weights.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)


def test_sharded_checkpoints_resume_exactly_and_open_on_one_process(together, tmp_path):
    out, curves = together
    assert curves["resumed"] == curves["sharded"]
    folder = out / "stopped" / "sharded"
    whole = load_file(folder / "weights.safetensors")
    assert all(torch.equal(v, whole[k]) for k, v in load_file(out / "sharded" / "weights.safetensors").items())
    averaged = load_run(folder, preset=preset_of(WAYS["sharded"][1]), averaged=True).system.state_dict()
    (folder / "weights.safetensors").rename(tmp_path / "w")
    with pytest.warns(UserWarning, match="not finished"):
        opened = load_run(folder, preset=preset_of(WAYS["sharded"][1]))
    assert all(torch.equal(v, whole[k]) for k, v in opened.system.state_dict().items())
    with pytest.warns(UserWarning, match="not finished"):
        opened = load_run(folder, preset=preset_of(WAYS["sharded"][1]), averaged=True)
    assert all(torch.equal(v, averaged[k]) for k, v in opened.system.state_dict().items())


def test_an_error_of_the_first_rank_reaches_all(together):
    assert len(together[1]["refused"]) == 2 and all("already holds files" in said for said in together[1]["refused"])


def test_one_process_pays_nothing():
    here = World()
    value = torch.tensor([1.0, 2.0])
    assert here.mean(value) is value and here.agreed(3) == 3 and here.gathered(3) == [3] and here.first
    assert float(total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])) == 5


def test_synchronised_norms_keep_names_tensors_and_eval_results():
    system, x = toy().eval(), torch.randn(5, 12)
    names, before = list(system.state_dict()), system.frozen(x)
    synchronise_norms(system)
    assert isinstance(system.frozen[1], SyncNorm) and isinstance(system.frozen[1], torch.nn.BatchNorm1d)
    assert list(system.state_dict()) == names and torch.equal(system.frozen(x), before)


def test_unknown_devices_and_ways_are_refused():
    with pytest.raises(UserError, match="no device 'cuda:9'"):
        pick_device("cuda:9")
    with pytest.raises(UserError, match="no way 'dpp'"):
        World(kind="dpp")
