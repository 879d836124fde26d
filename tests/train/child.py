"""A run of the toy in its own process, to be killed: `python child.py OUT STEPS`. Also what torchrun starts."""
import json
import sys

import torch
from train.toys import Toy, ToyFeeding, preset_of, stage_of

from polysense.train.run import Finished, Stepped, train_preset


def plan(steps: int):
    """Two stages with an average, different trainable parts and learning rates, and dropout."""
    return preset_of(stage_of(steps=steps, name="one", ema=0.9),
                     stage_of(steps=5, name="two", objective=Toy.pointwise, embed=None, trainable=("vision.*", "log_scale"), lr=5e-3), dropout=0.2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, said = sys.argv[1], json.loads(sys.argv[2])
    for event in train_preset("toy", plan(said["steps"]), ("image", "text"), out=out, resume=True, feeding=ToyFeeding(),
                              checkpoint_every=said.get("every", 3), device="cpu"):
        if isinstance(event, (Stepped, Finished)):
            print(type(event).__name__, event.step, flush=True)
