"""The Transformer translates descriptions of scenes from a formal language into English and back, word for word, and cannot without cross-attention.

The score is the share of scenes of the test split whose translation is the right one to the last word, half of them from programs and half from
sentences. The same network without cross-attention writes what is likely without knowing what was asked. In the notes: greedy search, and how many
of the words that it writes are right at the same place. Rate, steps and sizes were chosen on the validation split.
"""
from typing import Any

import torch

from polysense.base.system import Preset
from polysense.data import source
from polysense.data.sources import ListSource
from polysense.proofs.arms import train_arm, words
from polysense.proofs.harness import Outcome
from polysense.systems.backbone import transformer
from polysense.towers.decoding import Greedy

WIDTH, DEPTH, STEPS, SIZE, PAIRS, ASKED = 96, 2, 300, 32, 5000, 200
METRIC, HIGHER_IS_BETTER = f"share of scenes translated without a mistake, {DEPTH} + {DEPTH} layers of width {WIDTH}, {STEPS} steps of {SIZE}", True
DATA = f"scenes:programs with one thing, of 8 shapes and 8 colours ({PAIRS} pairs in both directions; {ASKED} of the test split)"
SCENES = "scenes:programs?shapes=8&colours=8&objects=1&combos=all"


def pairs(split: str, n: int, seed: int = 0) -> ListSource:
    """Programs and sentences of n scenes, in both directions."""
    scenes = source(f"{SCENES}&n={n}&seed={seed}", split=split)
    rows = [(i, way, qa) for i in range(n) for way, qa in enumerate(scenes.about(i)["qa"])]
    return ListSource("programs", [{"id": f"{i}.{way}", "question": q, "answer": a, "captions": [a]} for i, way, (q, a) in rows],
                      ("text", "question", "answer"), split=split)


def plan(preset: Preset) -> Preset:
    language = transformer.net(320, 40, WIDTH, DEPTH, 4, 4 * WIDTH, 0.0)
    deaf = preset.config.language.decoder.block.cross is None  # type: ignore[attr-defined]
    made = language.but(**{"language.decoder.block.cross": None}) if deaf else language
    return preset.but(config=made, **{"feed.text.vocab": 320, "feed.text.length": 40, "stages.0.steps": STEPS, "stages.0.batch_size": SIZE})


def said(pipeline: Any, of: ListSource, how: Any = None) -> list[str]:
    """What is written for every question."""
    questions = [of.about(i)["question"] for i in range(len(of))]
    out: list[str] = []
    with torch.inference_mode():
        for start in range(0, len(questions), 100):
            text = pipeline.tokenizer(questions[start:start + 100])
            out += [pipeline.tokenizer.decode(row) for row in pipeline.system.translate_text(text, max_new=38, how=how)]
    return out


def exact(pipeline: Any, of: ListSource, how: Any = None) -> tuple[float, float]:
    """(share of translations without a mistake, share of words that are right at their place)."""
    answers = [pipeline.tokenizer.decode(pipeline.tokenizer([of.about(i)["answer"]])[0]) for i in range(len(of))]
    written = said(pipeline, of, how)
    words_ = [w == v for a, b in zip(answers, written, strict=True) for w, v in zip(a.split(), [*b.split(), *[""] * 60])]
    return sum(a == b for a, b in zip(answers, written, strict=True)) / len(answers), sum(words_) / len(words_)


def run(seed: int, chosen: bool = True) -> Outcome:
    train, test = pairs("train", PAIRS, seed), pairs("test" if chosen else "val", ASKED // 2, 0)
    tokenizer = words(plan(transformer.tiny()), train)
    arms = {name: train_arm("transformer", plan(preset()), train, needs=("question", "answer"), seed=seed, tokenizer=tokenizer)
            for name, preset in (("whole", transformer.tiny), ("deaf", transformer.alone))}
    (right, place), (without, place_without) = (exact(arms[k].subject, test) for k in ("whole", "deaf"))
    greedy = exact(arms["whole"].subject, test, Greedy.Config())[0]
    return Outcome(right, {"without cross-attention": without, "0.8": 0.8}, {
        "greedy": greedy, "beam at least as good": right >= greedy, "words right at their place": place, "without cross-attention": place_without,
        "final loss": arms["whole"].final_loss, "final loss without": arms["deaf"].final_loss})
