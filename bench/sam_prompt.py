"""What a prompt costs once a picture is encoded: SAM's prompt encoder and mask decoder at the size of ViT-B (64x64 grid, width 256), against the
same weights in transformers' SamModel. One click with three candidates, one picture, one thread, float32; medians, the two in turns.

    python bench/sam_prompt.py [--rounds 25] [--json docs/proofs/bench_sam_prompt.json]

"segment" is the whole call on a picture whose encoding is remembered, with finding out that it is the same picture.
"""
import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filing import PROOFS, goal, medians, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference import reference

from polysense.connectors.prompt import places
from polysense.systems.prompt import sam
from polysense.weights.sam_hf import LAYOUT

LIMIT_MS = 50.0


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.inference_mode()
def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--rounds", type=int, default=25)
    words.add_argument("--json", type=Path, default=PROOFS / "bench_sam_prompt.json")
    o = words.parse_args()
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
    seen, point, label = torch.randn(1, 64, 64, 256).permute(0, 3, 1, 2), torch.tensor([[[[500.0, 375.0]]]]), torch.ones(1, 1, 1, dtype=torch.long)

    def we() -> torch.Tensor:
        return ours.answer(seen, ours.prompt.tokens(*places(point[0] / 1024, label[0], None)), single=False)[0]  # type: ignore[misc]

    def they() -> torch.Tensor:
        return theirs(image_embeddings=seen, input_points=point, input_labels=label, multimask_output=True).pred_masks

    image = torch.randn(1, 3, 1024, 1024)

    def whole() -> torch.Tensor:
        return ours.segment(image, point / 1024, label)[0]  # type: ignore[operator]

    whole()
    gap = float((we() - they()[0]).abs().max())
    times: dict[str, list[float]] = {"ours": [], "transformers": [], "ours, segment": []}
    for _ in range(o.rounds):
        for name, run in (("ours", we), ("transformers", they), ("ours, segment", whole)):
            times[name].append(timed(run))
    seconds = medians(times)
    ratios = {"transformers / ours": seconds["transformers"] / seconds["ours"]}
    write(o.json, what="Processor seconds of one prompt on an encoded picture, SAM ViT-B size, fp32; a ratio above 1 is in our favour",
          settings={"rounds": o.rounds, "candidates": 3}, seconds=seconds, ratios=ratios,
          goals={"milliseconds of a prompt": goal(1e3 * seconds["ours"], most=LIMIT_MS),
                 "transformers / ours": goal(ratios["transformers / ours"], least=1.0)}, notes={"largest difference": gap})


if __name__ == "__main__":
    main()
