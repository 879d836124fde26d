"""Entities out of noisy alt-texts: cleaned by a small CLIP, learned beside contrast, they find the same thing again.

Pictures hold one thing each, a large one: a small one is four pixels wide here. Every pair of colour and shape is an invented species with a name;
alt-texts name it, one in five wrongly. A CLIP that has seen other pictures with plain captions scores each mention, and the worst three in ten are
dropped. Then the same towers learn from both sides, from classification alone and from contrast alone, and other pictures of the species look for
each other.
"""
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from polysense.base.system import Preset
from polysense.base.telling import Entities
from polysense.data import source
from polysense.data.entities import Entity, EntityBase
from polysense.data.retold import Retold
from polysense.data.sources import Sample, Source
from polysense.data.told import told
from polysense.proofs.arms import some_of, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.pool import large
from polysense.proofs.small import SIZE, fitted, kept, pair, plain_clip
from polysense.systems.align import mofi
from polysense.tasks.encode import encode_all_images
from polysense.train.judging import RunJudge

METRIC, HIGHER_IS_BETTER = "mean average precision: pictures of the same species", True
DATA = "scenes:combos, large things (about 3,000 pictures with alt-texts, 3,000 others for the filter; about 800 look for each other)"
STEPS, WRONG, DROPPED = 400, 0.2, 0.3


def species(classes: tuple[str, ...]) -> EntityBase:
    """An invented name and a description for every class."""
    parts = ("ba", "do", "ki", "lu", "me", "no", "pi", "ru", "sa", "te", "vo", "zu", "fe", "ga")
    names = [a + b + "x" for a in parts for b in parts]
    return EntityBase(Entity(f"E{i}", names[i], f"a {name}") for i, name in enumerate(classes))


def alt_texts(pictures: Source, base: EntityBase, seed: int) -> tuple[Retold, list[int]]:
    """Texts that name the species, some of them wrongly; and what is named."""
    rng, true = np.random.default_rng(seed), np.array(pictures.labels())
    named = np.where(rng.random(len(true)) < WRONG, rng.permutation(true), true).tolist()

    def tell(i: int, about: Sample) -> Sample:
        return about | {"captions": [f"my photo of a {base.entities[named[i]].name}"], "label": -1}
    return Retold(pictures, tell), named


class Described(RunJudge):
    """A judge that has never heard the invented names: it is asked by what they are said to be. All arms ask it the same, once."""
    kept: tuple[Tensor, Tensor] | None = None

    def features(self, source: Source, texts: list[str], rows: list[int]) -> tuple[Tensor, Tensor]:
        self.kept = self.kept or super().features(source, [t.partition(", ")[2] for t in texts], rows)
        return self.kept


def average_precision(features: Tensor, label: Tensor) -> float:
    """Mean over pictures that have another of their kind."""
    order = (features @ features.T).fill_diagonal_(-torch.inf).argsort(1, descending=True)[:, :-1]
    hit = (label[order] == label[:, None]).float()
    precision = hit.cumsum(1) / torch.arange(1, hit.shape[1] + 1)
    return float(((precision * hit).sum(1) / hit.sum(1))[hit.sum(1) > 0].mean())


def plan(share: float, base: Path, entities: int) -> Preset:
    config = mofi.MOFI.Config(**pair(), dim=96, entities=entities, sampled=64)
    return fitted(mofi.tiny(), config, STEPS, **{"stages.0.weights": mofi.weights_of(share),
                                                 "feed.told": (Entities(base=str(base), judge="clip", dropped=DROPPED),)})


def run(seed: int, test_seed: int = 1001) -> Outcome:
    def drawn(n: int, number: int, split: str = "train") -> Source:
        return some_of(kept(large(source(f"scenes:combos?n={3 * n}&seed={number}&size={SIZE}", split=split))), n, number)
    train, other, test = drawn(3000, seed), drawn(3000, seed + 500), drawn(800, test_seed, "val")
    base = species(train.classes)
    said, named = alt_texts(train, base, seed)
    clip, found = train_arm("clip", plain_clip(STEPS), other, needs=("image", "text"), seed=seed).subject, dict[str, float]()
    judge = Described(clip.system, clip.preset, clip.tokenizer)
    with TemporaryDirectory() as folder:
        file = base.write(Path(folder) / "species.jsonl")
        labelled = told(said, plan(0.5, file, len(base.entities)).feed, judge)
        tokenizer = words(plan(0.5, file, len(base.entities)), labelled)
        for name, share in (("both", 0.5), ("classification alone", 1.0), ("contrast alone", 0.0)):
            subject = train_arm("mofi", plan(share, file, len(base.entities)), said, needs=("image", "text", "label"), seed=seed,
                                tokenizer=tokenizer, judge=judge).subject
            features = encode_all_images(subject, test)
            found[name] = average_precision(features.features, torch.from_numpy(features.labels))
    true, label = np.array(train.labels()), np.array(labelled.labels())
    return Outcome(found.pop("both"), {"contrast alone": found.pop("contrast alone")}, found | {
        "labels that are right before the filter": float((np.array(named) == true).mean()),
        "labels that are right after it": float((label == true)[label >= 0].mean()), "samples with a label": float((label >= 0).mean())})
