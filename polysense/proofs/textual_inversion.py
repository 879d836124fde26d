"""A word learned from five pictures of a thing that the model never saw draws that thing better than the nearest word it knew.

The model is trained on circles, squares and triangles; the new thing is a red star. Likeness is the cosine between features of a small classifier
that was taught with stars too, of what is drawn and of held-out pictures of the thing. Baselines: the coarse word that the row began as, and a row
of random numbers. The model is that of latent diffusion's proof: in fewer steps it does not hear words at all, and no row can matter.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.base.plan import WordsPlan
from polysense.data import source
from polysense.data.concept import concept
from polysense.pipeline import Pipeline
from polysense.proofs.arms import train_arm, words
from polysense.proofs.controlnet import lent_fields
from polysense.proofs.harness import Outcome
from polysense.proofs.latent_diffusion import learned_judge, plan
from polysense.proofs.latents import all_of, compressed, lend, standing
from polysense.proofs.pool import batches, large
from polysense.systems.generate import textual_inversion
from polysense.systems.generate.textual_inversion import TextualInversion
from polysense.tasks.generation import Judge, seen_by

METRIC, HIGHER_IS_BETTER = "likeness of drawn pictures to held-out pictures of the new thing (cosine of classifier features)", True
COMMON = "scenes:combos?style=plain&size=32&combos=all&captions=1&colours=red,green,blue,yellow"
DATA = "large circles, squares and triangles at 32 px (about 3,000); five of a red star, 50 held out"
COMPRESS, DENOISE, LEARN, COUNT, COARSE = 900, 1100, 150, 50, "triangle"


def likeness(judge: Judge, drawn: Tensor, real: Tensor) -> float:
    one, two = (F.normalize(torch.from_numpy(seen_by(judge, x)[0]), dim=1) for x in (drawn, real))
    return float((one @ two.T).mean())


def compare(seed: int, test_seed: int, compress: int = COMPRESS, denoise: int = DENOISE, learn: int = LEARN) -> Outcome:
    train = large(source(f"{COMMON}&shapes=circle,square,triangle&n=9000&seed={seed}"))
    base = plan(compress, denoise).but(**{"stages.1.batch_size": 32, "stages.1.optim.lr": 1e-3, "stages.1.trainable": ("unet.*",)})
    judge = learned_judge(large(source(f"{COMMON}&shapes=circle,square,triangle,star&n=9000&seed={seed + 50}")), base.feed)
    tokenizer = words(base, train)
    first, kept = compressed(base, all_of(train, base, tokenizer), train, seed, tokenizer)
    later = standing(base.but(stages=base.stages[1:]))
    learned = train_arm("latent_diffusion", later, train, needs=(), seed=seed, tokenizer=tokenizer, prepare=lend(first.system),
                        batches=batches(kept, later.stages[0].batch_size, seed)).subject
    stars = f"{COMMON.replace('red,green,blue,yellow', 'red')}&shapes=star"
    few, held = (large(source(f"{stars}&n={8 * n}&seed={s}", split=split)) for n, s, split in ((5, seed + 7, "train"), (COUNT, test_seed, "test")))
    real = learned.read_images([held[i]["image"] for i in range(min(COUNT, len(held)))])

    plain = base.feed.text
    assert plain is not None
    text = WordsPlan(vocab=plain.vocab, length=plain.length, new=(("<it>", 1),))
    tokenizer = words(base.but(**{"feed.text": text}), train)
    coarse = tuple(i for i in tokenizer(COARSE)[0].tolist() if i not in (tokenizer.start, tokenizer.end))
    preset = textual_inversion.tiny().but(config=TextualInversion.Config(**lent_fields(later.config) | {"drop": 0.0}, like=coarse), starts=()).but(**{
        "feed.text": text, "stages.0.steps": learn, "stages.0.batch_size": 16})
    data = concept([few[i]["image"] for i in range(5)], "<it>", ("a {}", "a picture of a {}", "there is a {}"))
    subject = train_arm("textual_inversion", preset, data, needs=("image", "text"), seed=seed, tokenizer=tokenizer,
                        prepare=lend(learned.system)).subject

    def draw(who: Pipeline, said: str) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return who.system.generate_image(who.read_texts([said] * COUNT), steps=15)

    own, word = draw(subject, "a <it>"), draw(subject, f"a {COARSE}")
    with torch.no_grad():
        subject.system.word.copy_(torch.randn_like(subject.system.word) * subject.system.text.embed.weight.std())
    blind = draw(subject, "a <it>")
    return Outcome(likeness(judge, own, real), {"the coarse word": likeness(judge, word, real), "a random row": likeness(judge, blind, real)},
                   {"likeness of held-out pictures to each other": likeness(judge, real[:25], real[25:]),
                    "likeness of the five": likeness(judge, learned.read_images([few[i]["image"] for i in range(5)]), real)})


def run(seed: int) -> Outcome:
    return compare(seed, 1001)
