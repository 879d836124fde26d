"""From the same few samples DeCLIP learns more than CLIP, for more work on each.

Both arms see the same number of pairs of drawn things, few of them distinct; DeCLIP reads each in two views and two tellings. Two ablations are
logged: without the neighbours, and without self-supervision.
"""
from polysense.base.system import Preset
from polysense.data import source
from polysense.proofs.arms import Present, exam, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.small import SIZE, fitted, kept, pair
from polysense.systems.align import declip

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy among the names of 36 unseen pairs of colour and shape", True
DATA = "scenes:combos (2,000 pictures; tested on the held-out combinations)"
STEPS, NEEDS = 140, ("views", "text", "retold")


def plan(**weights: float) -> Preset:
    towers = pair()
    towers["text"] = towers["text"].but(vocab=1025)
    config = declip.DeCLIP.Config(**towers, **declip.heads(96, 192, 48, 96, 1025), queue=declip.Queue.Config(size=1024, width=96),
                                  hide=declip.WordMask.Config(vocab=1025, mask=1024, special=(0, 1, 2)))
    view = declip.strong(SIZE).but(scale=(0.5, 1.0), jitter=0.5, jitter_by=(0.3, 0.3, 0.3, 0.0), grey=0.0, blur=0.0)
    return fitted(declip.tiny(), config, STEPS, **{"feed.views": (view, view), "stages.0.weights": tuple(weights.items()), "stages.0.batch_size": 96})


def run(seed: int, test: str = "scenes:combos?n=1000&seed=1001") -> Outcome:
    train, unseen = kept(source(f"scenes:combos?n=2000&seed={seed}&size={SIZE}")), Present(kept(source(f"{test}&size={SIZE}", split="test")))
    arms = {"declip": declip.weights_of(), "clip": declip.weights_of(0, 0, 0), "without neighbours": declip.weights_of(g=0.0),
            "without self-supervision": declip.weights_of(a=0.0)}
    tokenizer, found = words(plan(), train), {}
    for name, weights in arms.items():
        subject = train_arm("declip", plan(**dict(weights)), train, needs=NEEDS, seed=seed, tokenizer=tokenizer).subject
        found[name] = exam("zero_shot", subject, unseen, "accuracy")
    return Outcome(found.pop("declip"), {"CLIP on the same samples": found.pop("clip")}, found | {"chance": 1 / len(unseen.classes)})
