"""BERT guesses hidden words of captions that it has not seen better than counts of neighbouring words do, and its [CLS] learns what a text is about.

The trigram baseline knows both neighbours of a hidden word: it says the word that stood most often between these two in training, else the one that
is likeliest by either neighbour alone (counts of both multiplied), else the most frequent of all. Both see the same texts, and the same places are
hidden from them. In the notes: what shape a sentence about a drawn thing names, one of ten, by a linear classifier of [CLS], and of the [CLS] of
the same encoder untrained. The rate is that of the preset; a higher one was worse on captions set aside. The number of steps is what five minutes
allow. As filed, counts of both neighbours guess more than the network, which hears of a few hundred hidden words a step and is still learning when
the steps end; its [CLS] tells shapes no better than that of the untrained network, in which a sentence of so few words is laid out plainly.
"""
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from polysense.data import source
from polysense.data.sources import ConcatSource, ListSource, Source
from polysense.proofs.arms import drawn, rest_of, some_of, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import bert

STEPS, SHARE, KINDS = 2000, 0.15, 10
SCENES, SHOWN = "scenes:programs?shapes=10&objects=1&combos=all", (300, 500)     # scenes whose captions the probe learns from, and is examined on
METRIC, HIGHER_IS_BETTER = f"share of hidden words of held-out captions guessed at once, 2 layers of width 128, {STEPS} steps of 64", True
DATA = "captions of natural_captions (train, dev) and of 1,000 drawn scenes"
PAD, CLS, SEP, MASK = 0, 1, 2, 4


def plan() -> Any:
    return bert.tiny().but(**{"stages.0.steps": STEPS, "config.pool": "cls", "config.text.body.depth": 2})


def exam(tokenizer: Any, captions: list[str], seed: int, times: int = 4) -> tuple[Tensor, Tensor]:
    """Texts [N,L], each `times` times, and which of their words are hidden."""
    text = tokenizer(captions * times)
    lot = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(text.shape, generator=lot) < SHARE) & (text > MASK)
    return text, hidden


class Trigram:
    """Counts of words between and beside others."""

    def __init__(self, texts: Tensor):
        self.between: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        self.behind: dict[int, Counter[int]] = defaultdict(Counter)
        self.before: dict[int, Counter[int]] = defaultdict(Counter)
        self.all = Counter[int]()
        for row in texts.tolist():
            row = [i for i in row if i != PAD]
            for left, word, right in zip(row, row[1:], row[2:]):
                self.between[left, right][word] += 1
                self.behind[left][word] += 1
                self.before[right][word] += 1
                self.all[word] += 1

    def guess(self, left: int, right: int) -> int:
        if found := self.between.get((left, right)):
            return max(found, key=lambda w: (found[w], self.all[w], -w))
        a, b = self.behind.get(left, Counter()), self.before.get(right, Counter())
        both = {w: a[w] * b[w] / self.all[w] for w in a if w in b} or a or b or self.all
        return max(both, key=lambda w: (both[w], self.all[w], -w))

    def score(self, text: Tensor, hidden: Tensor) -> float:
        """Share of hidden words guessed; a hidden neighbour is a word that was never seen."""
        right = 0
        shown = text.masked_fill(hidden, MASK)
        for i, j in hidden.nonzero().tolist():
            right += self.guess(int(shown[i, j - 1]), int(shown[i, j + 1])) == int(text[i, j])
        return right / int(hidden.sum())


@torch.inference_mode()
def guessed(system: Any, text: Tensor, hidden: Tensor) -> float:
    said = torch.cat([system.guess_words(t, h).argmax(-1) for t, h in zip(text.split(100), hidden.split(100))])
    return float((said == text[hidden]).float().mean())


@torch.inference_mode()
def features(system: Any, tokenizer: Any, of: Source) -> tuple[Tensor, Tensor]:
    """[CLS] of every caption, and the label of what it is about."""
    said = [(c, int(a["label"])) for a in (of.about(i) for i in range(len(of))) for c in a["captions"]]
    text = tokenizer([c for c, _ in said])
    return torch.cat([system.encode_text(t) for t in text.split(200)]), torch.tensor([k for _, k in said])


def probe(system: Any, tokenizer: Any, train: Source, test: Source) -> float:
    """Accuracy of a linear classifier on [CLS]."""
    (x, y), (u, v) = features(system, tokenizer, train), features(system, tokenizer, test)
    x, u = (x - x.mean(0)) / x.std(0).clamp(min=1e-6), (u - x.mean(0)) / x.std(0).clamp(min=1e-6)
    layer = torch.nn.Linear(x.shape[1], KINDS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    batches = drawn(x, y, 200, 0)
    for _ in range(300):
        batch = next(batches)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(batch["image"]), batch["label"]).backward()
        optimizer.step()
    return float((layer(u).argmax(1) == v).float().mean())


def texts_of(of: Source) -> ListSource:
    """Captions in memory, without pictures."""
    return ListSource(of.name, [{"id": of.id(i), "captions": of.about(i)["captions"]} for i in range(len(of))], ("text",), split=of.split)


def scenes(n: int, split: str, seed: int = 0) -> ListSource:
    """A sentence about each of n drawn things, with the number of its shape."""
    of = source(f"{SCENES}&n={n}&seed={seed}", split=split)
    abouts = [of.about(i) for i in range(n)]
    return ListSource(of.name, [{"id": a["id"], "captions": [a["qa"][0][1]], "label": a["label"]} for a in abouts], ("text", "label"), split=split)


def run(seed: int, chosen: bool = True) -> Outcome:
    natural = source("natural_captions")
    test = source("natural_captions", split="dev") if chosen else some_of(natural, 150, 0)
    both = ConcatSource([texts_of(natural if chosen else rest_of(natural, 150, 0)), scenes(1000, "train", seed)])
    tokenizer = words(plan(), both)
    arm = train_arm("bert", plan(), both, needs=("text", "segment", "follows"), seed=seed, tokenizer=tokenizer)
    system = arm.subject.system
    text, hidden = exam(tokenizer, list(test.captions()), seed)
    counts = Trigram(tokenizer(list(both.captions())))
    torch.manual_seed(seed)
    raw = plan().config.build().eval()
    shown, asked = scenes(SHOWN[0], "train", seed + 100), scenes(SHOWN[1], "test" if chosen else "val")
    learned, untrained = (probe(s, tokenizer, shown, asked) for s in (system, raw))
    return Outcome(guessed(system, text, hidden), {"trigram": counts.score(text, hidden)}, {
        "hidden words": int(hidden.sum()), "final loss": arm.final_loss, "shape from [CLS]": learned, "untrained": untrained,
        "twenty points better": learned >= untrained + 0.2})
