"""VLMo's three stages on drawn scenes: hidden words are guessed from the picture, not from the text alone.

Scenes of two things, told as "a red star left of a blue cross". The score is the share of hidden words of unseen captions that are guessed beside
their own picture; the baseline is the same network beside the picture of another. In the notes: recall@5 by the two single passes (mean of both
directions) among 200 pictures, and with the ten best looked at again by the fusion pass of the same weights. Sized once, on other scenes: the picture
helps with words; after so few steps the second look did not yet help the search.
"""
from polysense.base.system import Preset
from polysense.proofs import multiway
from polysense.proofs.arms import train_arm
from polysense.proofs.harness import Outcome
from polysense.proofs.multiway import DEPTH, HEADS, LENGTH, MASK, PATCH, SIZE, SPECIAL, VOCAB, WIDE
from polysense.systems.selfsup import vlmo
from polysense.towers.multiway import shared_multiway

METRIC, HIGHER_IS_BETTER = "share of hidden words guessed beside their own picture", True
DATA = multiway.DATA
PICTURES, TEXTS, PAIRS, RERANK = 120, 100, 300, 10


def plan() -> Preset:
    net = shared_multiway(SIZE, PATCH, WIDE, DEPTH, HEADS, 1, VOCAB, LENGTH, 1.0, 16)
    base = vlmo.captions()
    return multiway.sized(base.but(config=vlmo.config(net, multiway.target(), 6, 2, MASK, SPECIAL)), (PICTURES, TEXTS, PAIRS))


def run(seed: int, part: str = "test") -> Outcome:
    train, test = multiway.scenes(seed, part)
    codec = multiway.tokenizer_of_pictures(train, seed)
    arm = train_arm("vlmo", plan(), train, needs=("image", "text", "word"), seed=seed, prepare=lambda system: multiway.lend(codec, system))
    guessed = multiway.words_guessed(arm.subject, test, seed)
    return Outcome(guessed["its picture"], {"another's picture": guessed["another's picture"]}, {
        "recall@5, two single passes": multiway.recall(arm.subject, test), "chance": 5 / len(test), "final loss": arm.final_loss,
        "recall@5, the ten best looked at again": multiway.recall(arm.subject, test, RERANK)})
