"""What a prompt costs once a picture is encoded: SAM's prompt encoder and mask decoder at the size of ViT-B (64x64 grid, width 256), against the
same weights in transformers' SamModel. One click with three candidates, one picture, one thread, float32; medians, the two in turns.

    python bench/sam_prompt.py
"""
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.connectors.prompt import places
from polysense.systems.prompt import sam
from polysense.weights.sam_hf import LAYOUT

LIMIT_MS = 50.0


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@torch.inference_mode()
def main(repeats: int = 15) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hf = reference("transformers.models.sam")
    small = {"num_hidden_layers": 1, "hidden_size": 96, "num_attention_heads": 2}       # the image encoder is not measured
    theirs = hf.SamModel(hf.SamConfig(vision_config=small)).eval()
    _, overrides = LAYOUT.read(theirs.config.to_dict() | {"model_type": "sam"}, {})
    config = sam.vit_b().but(**{k: v for k, v in overrides.items() if k != "config.vision.whole"} | {"config.vision.whole": ()}).config
    ours = config.build().eval()
    own = {k: v for k, v in ours.state_dict().items() if k.startswith("vision.")}
    ours.load_state_dict({**LAYOUT.keymap(config).load({k: v for k, v in theirs.state_dict().items()}), **own})
    seen, point, label = torch.randn(1, 256, 64, 64), torch.tensor([[[[500.0, 375.0]]]]), torch.ones(1, 1, 1, dtype=torch.long)

    def we() -> torch.Tensor:
        return ours.answer(seen, ours.prompt.tokens(*places(point[0] / 1024, label[0], None)), single=False)[0]  # type: ignore[misc]

    def they() -> torch.Tensor:
        return theirs(image_embeddings=seen, input_points=point, input_labels=label, multimask_output=True).pred_masks

    gap = float((we() - they()[0]).abs().max())
    pairs = [(timed(we), timed(they)) for _ in range(repeats)]
    mine, other = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    return {"ours_ms": round(mine, 2), "transformers_ms": round(other, 2), "ratio": round(other / mine, 3), "largest_difference": gap,
            "limit_ms": LIMIT_MS, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    print(json.dumps(main()))
