"""Saying how to answer pays; two layers for one, and more pixels, tabulated: short answers to questions about rendered scenes.

Training conversations answer half of the questions in a sentence, and in a word or two those behind which the response format is said.
Four arms (one linear or two layers; 16 or 32 px) are trained alike on them, and asked with and without the format. Everything else is as in
LLaVA's proof. Sizes are a first guess, made on the validation split.
"""
from typing import Any

from polysense.connectors.linear import LinearConnector
from polysense.data import source
from polysense.data.sources import Sample, Source, Subset
from polysense.proofs.arms import Arm, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.talk import exact_match, fed, questions, shown, sight, small, staged
from polysense.systems.lmm import llava_1_5

METRIC, HIGHER_IS_BETTER = "exact match of short answers, asked for with the response format (two layers, 32 px)", True
DATA = "scenes:qa, one thing of two shapes and six colours at 32 px (1,200 train, 200 test, up to four questions each)"
SCENES, NEEDS = "scenes:qa?objects=1&digits=0&style=plain&shapes=circle,cross&colours=6&size=32&seed={}&n={}", ("text", "chat", "chat_reply")
FORMAT = "answer in one word."
SEE, READ, ALIGN, INSTRUCT = 80, 200, 40, 80          # steps
PLAN = small(llava_1_5.tiny())


class Formats(Subset):
    """Every second question is answered in a sentence; behind the others the format is said, and the answer is short."""

    def __init__(self, base: Source):
        super().__init__(base, range(len(base)))

    def _about(self, i: int) -> Sample:
        about = self.base.about(i)
        chat = [(f"{q} {FORMAT}", a) if (i + n) % 2 else (q, f"the answer is {a}") for n, (q, a) in enumerate(about["qa"][:2])]
        return {**about, "chat": chat}


def run(seed: int, split: str = "test", asked_of: int = 200) -> Outcome:
    train, test = Formats(source(SCENES.format(seed, 1200))), source(SCENES.format(seed + 500, asked_of), split=split)
    tokenizer, asked = words(PLAN, train), questions(test)

    def arm(steps: dict[str, int], seen: Any, connector: Any, start: Arm | None = None) -> Arm:
        plan = staged(PLAN, steps, 32)
        plan = plan if connector is None else plan.but(config=plan.config.but(connector=connector))

        def prepare(system: Any) -> None:
            if start is not None:
                system.language.load_state_dict(start.subject.system.language.state_dict())  # type: ignore[union-attr]
        return train_arm("llava_1_5", plan, train, needs=NEEDS, seed=seed, tokenizer=tokenizer, prepare=prepare,
                         batches=fed(train, seen, plan, tokenizer, NEEDS, batch_size=32, seed=seed))

    table: dict[str, float] = {}
    reader: Arm | None = None
    for size in (16, 32):
        eye = sight(seed, SEE, size)
        seen, held = shown(eye, train, size), shown(eye, test, size)
        reader = reader or arm({"read": READ}, seen, None)
        for name, connector in {"linear": LinearConnector.Config(into=192, out=96), "two layers": None}.items():
            ours = arm({"align": ALIGN, "instruct": INSTRUCT}, seen, connector, reader).subject
            table[f"{name}, {size} px"] = exact_match(ours, held, asked, short=FORMAT)
            table[f"{name}, {size} px, without the format"] = exact_match(ours, held, asked)
    ours, bare = table.pop("two layers, 32 px"), table.pop("two layers, 32 px, without the format")
    return Outcome(ours, {"the same, without the format": bare}, {**table, "questions": len(asked)})
