"""Two ranks keep one queue and one centre: those that one process with the whole batch would have."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from polysense.base.catalogue import preset_of
from polysense.base.system import After
from polysense.mechanisms.queue import Queue
from polysense.nn.head import LinearBias
from polysense.objectives.spread import spread
from polysense.systems.selfsup import dino, moco
from polysense.systems.selfsup.dino import tower

BODY = tower(16, 8, 16, 1, 2)


def steps(rank: int, ranks: int) -> dict[str, list[float]]:
    """Two steps of each system without an optimiser on this rank's share: losses, queue, centre."""
    torch.manual_seed(0)
    base = preset_of("moco").config
    queued = base.but(backbone=BODY, projector=LinearBias.Config(into=16, out=6), queue=Queue.Config(size=12, width=6)).build()
    met = base.but(backbone=BODY, projector=LinearBias.Config(into=16, out=6), queue=None, predictor=LinearBias.Config(into=6, out=6)).build()
    taught = preset_of("dino").config.but(backbone=BODY).but(**{"projector.into": 16, "projector.hidden": 12, "projector.bottleneck": 8,
                                                               "projector.out": 10, "centre.width": 10}).build()
    out: dict[str, list[float]] = {"losses": []}
    for step in (1, 2):
        g = torch.Generator().manual_seed(step)
        batch = {"views": torch.randn(4, 2, 3, 16, 16, generator=g), "crops": torch.randn(4, 2, 3, 8, 8, generator=g)}
        mine = {k: v.chunk(ranks)[rank] for k, v in batch.items()}
        for system, objective in ((queued, moco.MoCo.look_up), (met, moco.MoCo.meet), (taught, dino.DINO.losses)):
            losses = objective(system, mine)
            out["losses"].append(float(losses.total().detach()))
            with torch.no_grad():
                system.after_step(After(step, step / 2, None, losses.keep))      # type: ignore[arg-type]
    return out | {"queue": queued.queue.keys.flatten().tolist(), "pointer": [float(queued.queue.pointer)], "centre": taught.centre.value.tolist()}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])}
    running = [subprocess.Popen([sys.executable, __file__, str(r), str(place)], env=env) for r in (0, 1)]
    assert [p.wait(timeout=120) for p in running] == [0, 0]
    return [json.loads((place / f"{r}.json").read_text()) for r in (0, 1)]


def test_one_queue_one_centre_one_loss(together):
    alone = steps(0, 1)
    for name in ("queue", "pointer", "centre"):
        assert together[0][name] == together[1][name], "ranks agree to the bit"
        torch.testing.assert_close(torch.tensor(together[0][name]), torch.tensor(alone[name]), rtol=1e-4, atol=1e-5)
    mean = torch.tensor([r["losses"] for r in together]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(alone["losses"]), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    me, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=me, world_size=2)
    with spread():
        (folder / f"{me}.json").write_text(json.dumps(steps(me, 2)))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)                              # torch's threads sometimes abort an unwinding interpreter
