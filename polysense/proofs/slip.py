"""Self-supervision beside the captions makes better features from few pairs.

SLIP and CLIP see the same captioned photographs for the same number of steps; their frozen image towers are probed on another set of
photographs with labels. SimCLR alone (the clip term weighted zero) is logged beside them.
"""
from polysense.base.system import Preset
from polysense.data import source
from polysense.proofs.arms import exam, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.align import slip

METRIC, HIGHER_IS_BETTER = "linear-probe accuracy on cifar10 (3,000 train, 2,000 test)", True
DATA = "natural_captions (train), probed on cifar10; retrieval on natural_captions (dev)"
STEPS = 200


def weighted(**terms: float) -> Preset:
    return slip.tiny().but(**{"stages.0.steps": STEPS, "stages.0.weights": tuple(terms.items())})


def run(seed: int) -> Outcome:
    pairs, dev = source("natural_captions"), source("natural_captions", split="dev")
    labelled, test = some_of(source("cifar10"), 3000, seed), source("cifar10", split="test")
    arms = {name: train_arm("slip", plan, pairs, needs=("image", "text", "views"), seed=seed).subject
            for name, plan in {"slip": weighted(), "clip": weighted(ssl=0.0), "simclr": weighted(clip=0.0)}.items()}
    probe = {name: exam("linear_probe", subject, test, "accuracy", train=labelled) for name, subject in arms.items()}
    found = {f"{name}: text to image R@10": exam("retrieval", arms[name], dev, "text_to_image_r10") for name in ("slip", "clip")}
    return Outcome(probe["slip"], {"clip at equal steps": probe["clip"]}, {"simclr alone": probe["simclr"], **found})
