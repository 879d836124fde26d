"""Saying how to answer pays; two layers for one, and more pixels, tabulated: short answers to questions about rendered scenes.

Training conversations answer half of the questions in a sentence, and in a word or two those behind which the response format is said.
Four arms (one linear or two layers; 32 or 64 px) are trained alike on them, and asked with and without the format. Everything else is as in
LLaVA's proof. Sized on the validation split.
"""
from typing import Any

from polysense.base.system import Preset
from polysense.connectors.linear import LinearConnector
from polysense.data import source
from polysense.data.sources import Sample, Source, Subset
from polysense.proofs.arms import train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.talk import carried, exact_match, questions, sight, small, staged
from polysense.systems.lmm import llava_1_5

METRIC, HIGHER_IS_BETTER = "exact match of short answers, asked for with the response format (two layers, 64 px)", True
DATA = "scenes:qa, one or two things a scene (1,500 train, 100 test, up to four questions each)"
SCENES, NEEDS = "scenes:qa?objects=1-2&digits=0&style=plain&seed={}&n={}", ("image", "text", "chat", "chat_reply")
FORMAT = "answer in one word."
SEE, READ, ALIGN, INSTRUCT = 100, 60, 30, 100
PLAN = small(llava_1_5.tiny())


class Formats(Subset):
    """Every second question is answered in a sentence; behind the others the format is said, and the answer is short."""

    def __init__(self, base: Source):
        super().__init__(base, range(len(base)))

    def _about(self, i: int) -> Sample:
        about = self.base.about(i)
        chat = [(f"{q} {FORMAT}", a) if (i + n) % 2 else (q, f"the answer is {a}") for n, (q, a) in enumerate(about["qa"][:2])]
        return {**about, "chat": chat}


def sized(size: int, connector: Any = None) -> Preset:
    plan = PLAN.but(**{"feed.image.size": size, "config.vision.tower.image_size": size})
    return plan if connector is None else plan.but(config=plan.config.but(connector=connector))


def run(seed: int, split: str = "test", scale: float = 1.0, asked_of: int = 100) -> Outcome:
    train, test = Formats(source(SCENES.format(seed, 1500))), source(SCENES.format(seed + 500, asked_of), split=split)
    tokenizer, asked = words(PLAN, train), questions(test)
    see, read, align, instruct = (max(1, int(n * scale)) for n in (SEE, READ, ALIGN, INSTRUCT))
    text = train_arm("llava_1_5", staged(sized(64), {"read": read}, 32), train, needs=NEEDS, seed=seed, tokenizer=tokenizer).subject.system
    table: dict[str, float] = {}
    for size in (32, 64):
        eye = sight(train, seed, see, size)
        for name, connector in {"linear": LinearConnector.Config(into=192, out=128), "two layers": None}.items():
            def prepare(system: Any, eye: Any = eye) -> None:
                carried(eye, "vision.tower")(system)
                system.language.load_state_dict(text.language.state_dict())  # type: ignore[union-attr]

            arm = train_arm("llava_1_5", staged(sized(size, connector), {"align": align, "instruct": instruct}, 32), train, needs=NEEDS, seed=seed,
                            tokenizer=tokenizer, prepare=prepare).subject
            table[f"{name}, {size} px"] = exact_match(arm, test, asked, short=FORMAT)
            table[f"{name}, {size} px, without the format"] = exact_match(arm, test, asked)
    ours = table.pop("two layers, 64 px")
    bare = table.pop("two layers, 64 px, without the format")
    return Outcome(ours, {"the same, without the format": bare}, {**table, "questions": len(asked)})
