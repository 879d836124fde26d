"""Every test runs on one thread (xdist uses the cores), from the same seed, with the data sets beside the checkout where they are there."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
nearby = Path(__file__).parents[2] / "shared" / "data"
if nearby.is_dir():
    os.environ.setdefault("POLYSENSE_DATA", str(nearby))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
