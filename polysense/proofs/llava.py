"""Seeing pays, and aligning first pays: exact answers to questions about rendered scenes.

As in the paper, captions are plenty and conversations few. A tower has learned to name colours and shapes, its features are computed once;
the language model reads captions and conversations without pictures, then LLaVA's two stages run. Against them: the second stage alone, as long,
and as long as both stages together; the language model without pictures; and LLaVA shown the pictures of other questions. Sizes are a first
guess, made on the validation split.

As filed, it beats the language model without pictures and the pictures of other questions clearly, a second stage of its own length by a little,
and misses one of the four: a second stage as long as both. What aligning adds at this size is no more than as many steps of conversation would.
"""
from polysense.data import source
from polysense.data.sources import Source, Subset
from polysense.proofs.arms import Arm, train_arm, words
from polysense.proofs.harness import Outcome
from polysense.proofs.talk import carried, exact_match, fed, questions, shown, sight, small, staged
from polysense.systems.lmm import llava

METRIC, HIGHER_IS_BETTER = "exact match of answers to questions about held-out scenes", True
DATA = "scenes:qa, one thing of two shapes and six colours at 32 px (1,200 train, conversations of 300; 200 test, up to four questions each)"
SCENES = "scenes:qa?objects=1&digits=0&style=plain&shapes=circle,cross&colours=6&size=32&seed={}&n={}"
NEEDS = ("brief", "brief_reply", "chat", "chat_reply")
PICTURES, TALKED = 1200, 300
SEE, READ, ALIGN, INSTRUCT = 80, 200, 100, 120         # steps
PLAN = small(llava.tiny())


def run(seed: int, split: str = "test", asked_of: int = 200) -> Outcome:
    train, test = source(SCENES.format(seed, PICTURES)), source(SCENES.format(seed + 500, asked_of), split=split)
    eye, tokenizer, asked = sight(seed, SEE), words(PLAN, train), questions(test)
    seen, held, few = shown(eye, train), shown(eye, test), Subset(train, range(TALKED))

    def arm(steps: dict[str, int], of: Source, start: Arm | None = None) -> Arm:
        plan = staged(PLAN, steps, 32)
        return train_arm("llava", plan, of, needs=NEEDS, seed=seed, tokenizer=tokenizer,
                         prepare=carried(dict(start.subject.system.state_dict())) if start else None,
                         batches=fed(of, seen, plan, tokenizer, NEEDS, batch_size=32, seed=seed))

    reader = arm({"read": READ}, train)
    ours = arm({"instruct": INSTRUCT}, few, arm({"align": ALIGN}, train, reader)).subject
    short, long = (arm({"instruct": n}, few, reader).subject for n in (INSTRUCT, ALIGN + INSTRUCT))
    return Outcome(exact_match(ours, held, asked), {
        "language model without pictures": exact_match(reader.subject, None, asked),
        "stage 2 without stage 1": exact_match(short, held, asked),
        "stage 2 as long as both": exact_match(long, held, asked),
        "pictures of other questions": exact_match(ours, held.roll(len(held) // 2, 0), asked)}, {"questions": len(asked)})
