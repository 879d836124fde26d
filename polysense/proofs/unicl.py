"""Labels and captions in one batch: UniCL knows that two pictures of cats may both be called a cat, CLIP holds it against them.

Half of the data are photographs of five kinds with prompts of their names, half captioned photographs. Both arms see the same batches; the
baseline is CLIP's loss on the same mixture.

As filed, the two are level: the mean is a hair above the baseline and the interval holds zero on both sides of it.
"""
from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import ConcatSource, Source
from polysense.proofs.arms import Present, exam, some_of, train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.small import fitted, of_classes, pair
from polysense.systems.align import unicl

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy on the five labelled kinds", True
DATA = "cifar10 (2,600 pictures of five kinds, prompts) mixed with natural_captions (train); tested on cifar10 (test) and natural_captions (dev)"
STEPS, BATCH, KINDS = 700, 32, (0, 1, 2, 3, 4)


def plan() -> Preset:
    return fitted(unicl.tiny(), unicl.UniCL.Config(**pair()), STEPS, **{"stages.0.batch_size": BATCH, "feed.told.0.templates": "seven"})


def run(seed: int, test: Source | None = None) -> Outcome:
    kinds = some_of(of_classes(source("cifar10"), KINDS), 2600, seed)
    mixed = ConcatSource([kinds, source("natural_captions")])
    test = of_classes(source("cifar10", split="test"), KINDS) if test is None else test
    test, dev, found = Present(test), source("natural_captions", split="dev"), {}
    clip = plan().but(**{"stages.0.objective": unicl.UniCL.compare, "stages.0.embed": unicl.UniCL.embed})
    for name, arm in (("unicl", plan()), ("clip", clip)):
        subject = train_arm("unicl", arm, mixed, needs=("image", "text", "label"), seed=seed).subject
        found[name] = exam("zero_shot", subject, test, "accuracy", templates="seven")
        found[f"{name}: text to image R@10"] = exam("retrieval", subject, dev, "text_to_image_r10")
    return Outcome(found.pop("unicl"), {"CLIP's loss on the same mixture": found.pop("clip")}, found | {"chance": 0.2})
