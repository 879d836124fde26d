"""Seeing pays, and aligning first pays: exact answers to questions about rendered scenes.

The tower is trained on captions first, the language model on the questions and answers alone; then LLaVA's two stages against the same
steps without the first (all of them instruction), the language model without pictures, and LLaVA shown the pictures of other questions.
Sized on the validation split.

As filed, it missed: seeing helps in the mean, but at so few steps those spent on aligning are better spent on instruction.
"""
from polysense.data import source
from polysense.proofs.arms import train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.talk import blind_match, carried, exact_match, questions, sight, small, staged
from polysense.systems.lmm import llava

METRIC, HIGHER_IS_BETTER = "exact match of answers to questions about held-out scenes", True
DATA = "scenes:qa, one or two things a scene (1,500 train, 200 test, up to four questions each)"
SCENES, NEEDS = "scenes:qa?objects=1-2&digits=0&style=plain&seed={}&n={}", ("image", "brief", "brief_reply", "chat", "chat_reply")
SEE, READ, ALIGN, INSTRUCT = 120, 100, 60, 150
PLAN = small(llava.tiny())


def run(seed: int, split: str = "test", scale: float = 1.0, asked_of: int = 200) -> Outcome:
    train, test = source(SCENES.format(seed, 1500)), source(SCENES.format(seed + 500, asked_of), split=split)
    eye, tokenizer, asked = sight(train, seed, int(SEE * scale)), words(PLAN, train), questions(test)
    read, align, instruct = (int(n * scale) for n in (READ, ALIGN, INSTRUCT))
    look = carried(eye, "vision.tower")
    reader = train_arm("llava", staged(PLAN, {"read": read}, 32), train, needs=NEEDS, seed=seed, tokenizer=tokenizer, prepare=look).subject
    start = carried(dict(reader.system.state_dict()), "")
    arms = {name: train_arm("llava", staged(PLAN, steps, 32), train, needs=NEEDS, seed=seed, tokenizer=tokenizer, prepare=start).subject
            for name, steps in {"two stages": {"align": align, "instruct": instruct}, "no alignment": {"instruct": align + instruct}}.items()}
    ours = arms["two stages"]
    return Outcome(exact_match(ours, test, asked), {
        "language model without pictures": blind_match(reader, asked),
        "stage 2 without stage 1, equal steps": exact_match(arms["no alignment"], test, asked),
        "pictures of other questions": exact_match(ours, test, asked, shuffled=True)}, {"questions": len(asked)})
