"""A name never heard is understood by its definition.

Pictures hold one thing each, a large one: a small one is four pixels wide here. The pairs of colour and shape that training sees go by their common
names, with and without the dictionary's definitions; those of the exam have invented names that occur nowhere in training. Asked are three times
chance, more than the system without knowledge, which is asked by name alone, and more than one that learned from names alone and is asked with the
definitions all the same: whether learning with them helps. The system with knowledge asked by name alone stands beside it. Prompts, definitions and
labels are made by the preset's own feed. As filed, names never heard are understood by their definitions, but best by the system that learned from
names alone, likely because its short texts say colour and shape in two words, and of a definition these are the words it knows, while definitions
in training bring others beside them.
"""
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from polysense.base.telling import Glosses, Triplets
from polysense.data import source
from polysense.data.knowledge import Knowledge
from polysense.data.retold import Retold
from polysense.data.sources import Source
from polysense.data.told import told
from polysense.proofs.arms import Present, exam, some_of, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.pool import large
from polysense.proofs.small import SIZE, fitted, kept, pair
from polysense.systems.align import klite

METRIC, HIGHER_IS_BETTER = "zero-shot accuracy among 36 names never seen in training", True
DATA = "scenes:combos, large things (4,000 pictures; tested on the held-out combinations, under invented names)"
STEPS, TEMPLATES = 700, ("a photo of a {}", "a picture of the {}")
STARTS, MIDDLES, ENDS = ("bl", "kr", "fl", "dr", "gr", "pl", "tr", "sk"), ("a", "e", "i", "o", "u"), ("ck", "mp", "nt", "sh", "ff", "lg", "zz")


def invented(names: tuple[str, ...], rare: set[int]) -> tuple[Knowledge, tuple[str, ...]]:
    """A dictionary and the names in it: those of the classes `rare` are invented, and each is said to be what the class is."""
    made = [s + m + e + f for f in ("", "o") for e in ENDS for m in MIDDLES for s in STARTS]
    order = np.random.default_rng(0).permutation(len(made))[:len(names)]
    called = tuple(made[o] if i in rare else name for i, (o, name) in enumerate(zip(order, names, strict=True)))
    return Knowledge.of({call: f"a {name}" for call, name in zip(called, names, strict=True)}), called


def renamed(base: Source, names: tuple[str, ...]) -> Source:
    """The same classes under other names, and nothing else said about them."""
    return Retold(base, lambda i, about: about | {"captions": []}, classes=names)


def run(seed: int, test: str = "scenes:combos?n=3000&seed=1001") -> Outcome:
    pictures = some_of(kept(large(source(f"scenes:combos?n=12000&seed={seed}&size={SIZE}"))), 4000, seed)
    dictionary, names = invented(pictures.classes, set(range(len(pictures.classes))) - set(pictures.labels()))
    nameless, exam_of = renamed(pictures, names), Present(renamed(kept(large(source(f"{test}&size={SIZE}", split="test"))), names))
    alone = [[t.replace("{}", name) for t in TEMPLATES] for name in exam_of.classes]
    found: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        book = dictionary.write(Path(folder) / "invented.jsonl")
        prompts = fitted(klite.tiny(), klite.KLITE.Config(**pair()), STEPS, **{"feed.told": (Triplets(templates=TEMPLATES),)})
        plan = prompts.but(**{"feed.told": (Triplets(templates=TEMPLATES), Glosses(dictionary=str(book)))})
        tokenizer = words(plan, told(nameless, plan.feed))
        asked = dictionary.prompts(exam_of.classes, TEMPLATES)
        for name, arm in (("with knowledge", plan), ("names alone", prompts)):
            subject = train_arm("klite", arm, nameless, needs=("image", "text", "label"), seed=seed, tokenizer=tokenizer).subject
            found[name] = exam("zero_shot", subject, exam_of, "accuracy", templates=TEMPLATES, prompts=None if arm is plan else asked)
            found[f"{name}, asked by name alone"] = exam("zero_shot", subject, exam_of, "accuracy", prompts=alone)
    chance = 1 / len(exam_of.classes)
    bars = {"three times chance": 3 * chance, "without knowledge": found.pop("names alone, asked by name alone"),
            "learned from names alone, asked with definitions": found.pop("names alone")}
    return Outcome(found.pop("with knowledge"), bars, found | {"chance": chance})
