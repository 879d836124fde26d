"""CLIP learns words that compose: pairs of colour and shape that no caption ever joined are told apart by name.

The control trains on the same pictures with captions of other pictures: what it scores comes from no pairing. Beside it, retrieval among
real photographs after a short run on captioned ones.
"""
from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import ListSource, Source
from polysense.proofs.arms import Present, exam, train_arm
from polysense.proofs.harness import Outcome
from polysense.systems.align import clip

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy among the names of 36 unseen pairs of colour and shape", True
DATA = "scenes:combos (8,000 pairs; tested on the held-out combinations) and natural_captions (dev)"
NEEDS = ("image", "text")


def small(steps: int) -> Preset:
    """ViT 4x128 of patch 16 at 64 px."""
    base = clip.tiny()
    return base.but(config=clip.config(64, 16, clip.body(128, 4, 2), clip.body(128, 3, 2), dim=128, vocab=4096, length=48, end=2)).but(
        **{"stages.0.steps": steps})


class Mismatched(ListSource):
    """The same pictures, each with the captions of another one."""

    def __init__(self, base: Source):
        n = len(base)
        super().__init__(base.name, [{"id": base.id(i), "captions": base.about((i + n // 2) % n)["captions"]} for i in range(n)], base.offers)
        self.base = base

    def heavy(self, i: int) -> tuple[str, ...]:
        return ("image",)

    def _load(self, i: int, key: str) -> object:
        return self.base.load(i, key)


def run(seed: int) -> Outcome:
    train, unseen = source(f"scenes:combos?n=8000&seed={seed}"), Present(source("scenes:combos?n=1000&seed=1001", split="test"))
    chance = 1 / len(unseen.classes)
    honest = train_arm("clip", small(600), train, needs=NEEDS, seed=seed)
    control = train_arm("clip", small(600), Mismatched(train), needs=NEEDS, seed=seed)
    photos, dev = source("natural_captions"), source("natural_captions", split="dev")
    seen = train_arm("clip", small(400), photos, needs=NEEDS, seed=seed)
    zero_shot = exam("zero_shot", honest.subject, unseen, "accuracy")
    return Outcome(zero_shot, {"five times chance": 5 * chance, "mismatched captions": exam("zero_shot", control.subject, unseen, "accuracy")}, {
        "chance": chance, "photographs: text to image R@10": exam("retrieval", seen.subject, dev, "text_to_image_r10"),
        "photographs: three times chance": 30 / len(dev), "loss": honest.final_loss, "loss of mismatched captions": control.final_loss})
