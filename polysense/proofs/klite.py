"""A name never heard is understood by its definition.

Every pair of colour and shape has an invented name; a dictionary defines it by colour and shape. Training sees the names of some pairs, with and
without their definitions, and the exam asks for pairs whose names occur nowhere in training, once with the dictionary and once without. The
baseline has learned from the names alone.
"""
import numpy as np

from polysense.data import source
from polysense.data.knowledge import Knowledge, informed
from polysense.data.retold import Retold, prompted
from polysense.data.sources import Source
from polysense.proofs.arms import Present, exam, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.small import SIZE, fitted, kept, pair
from polysense.systems.align import klite

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy among 36 names never seen in training", True
DATA = "scenes:combos (4,000 pictures under invented names; tested on the held-out combinations)"
STEPS, TEMPLATES = 300, ("a photo of a {}", "a picture of the {}")
STARTS, MIDDLES, ENDS = ("bl", "kr", "fl", "dr", "gr", "pl", "tr", "sk"), ("a", "e", "i", "o", "u"), ("ck", "mp", "nt", "sh", "ff", "lg", "zz")


def invented(names: tuple[str, ...]) -> Knowledge:
    """A dictionary: each name is that of an invented thing which is said to be what the class is."""
    made = [s + m + e + f for f in ("", "o") for e in ENDS for m in MIDDLES for s in STARTS]
    order = np.random.default_rng(0).permutation(len(made))[:len(names)]
    return Knowledge.of({made[i]: f"a {name}" for i, name in zip(order, names, strict=True)})


def renamed(base: Source, names: tuple[str, ...]) -> Source:
    """The same classes under other names."""
    return Retold(base, lambda i, about: about, classes=names)


def run(seed: int, test: str = "scenes:combos?n=1000&seed=1001") -> Outcome:
    pictures = kept(source(f"scenes:combos?n=4000&seed={seed}&size={SIZE}"))
    dictionary = invented(pictures.classes)
    names = tuple(dictionary.entries)
    plain = prompted(renamed(pictures, names), TEMPLATES)
    exam_of = Present(renamed(kept(source(f"{test}&size={SIZE}", split="test")), names))
    asked, found = dictionary.prompts(exam_of.classes, TEMPLATES), {}
    plan, told = fitted(klite.tiny(), klite.KLITE.Config(**pair()), STEPS), informed(plain, dictionary)
    tokenizer = words(plan, told)
    arms: dict[str, Source] = {"with knowledge": told, "names alone": plain}
    for name, data in arms.items():
        subject = train_arm("klite", plan, data, needs=("image", "text", "label"), seed=seed, tokenizer=tokenizer).subject
        found[name] = exam("zero_shot", subject, exam_of, "accuracy", prompts=asked)
        found[f"{name}, asked by name alone"] = exam("zero_shot", subject, exam_of, "accuracy", templates=TEMPLATES)
    chance = 1 / len(exam_of.classes)
    return Outcome(found.pop("with knowledge"), {"three times chance": 3 * chance, "learned from names alone": found.pop("names alone")},
                   found | {"chance": chance})
