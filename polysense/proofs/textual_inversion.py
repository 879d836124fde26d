"""A word learned from five pictures of a thing that the model never saw draws that thing better than the nearest word it knew.

The model is trained on circles, squares and triangles; the new thing is a red star. Likeness is the cosine between features of a small classifier
that was taught with stars too, of what is drawn and of held-out pictures of the thing. Baselines: the coarse word that the row began as, and a row
of random numbers. Sized on other seeds.
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
from polysense.proofs.latent_diffusion import plan
from polysense.systems.generate import textual_inversion
from polysense.systems.generate.textual_inversion import TextualInversion
from polysense.tasks.generation import Judge, seen_by, teach

METRIC, HIGHER_IS_BETTER = "likeness of drawn pictures to held-out pictures of the new thing (cosine of classifier features)", True
COMMON = "scenes:single?style=plain&size=32&colours=red,green,blue,yellow"
DATA = "scenes of circles, squares and triangles at 32 px (3,000); five of a red star, 50 held out"
COMPRESS, DENOISE, LEARN, COUNT, COARSE = 400, 250, 150, 50, "triangle"


def likeness(judge: Judge, drawn: Tensor, real: Tensor) -> float:
    one, two = (F.normalize(torch.from_numpy(seen_by(judge, x)[0]), dim=1) for x in (drawn, real))
    return float((one @ two.T).mean())


def compare(seed: int, test_seed: int, compress: int = COMPRESS, denoise: int = DENOISE, learn: int = LEARN) -> Outcome:
    train, base = source(f"{COMMON}&shapes=circle,square,triangle&n=3000&seed={seed}"), plan(compress, denoise)
    judge = teach(source(f"{COMMON}&shapes=circle,square,triangle,star&n=3000&seed={seed + 50}"), base.feed.image, steps=300)
    tokenizer = words(base, train)
    learned = train_arm("latent_diffusion", base, train, needs=("image", "text"), seed=seed, tokenizer=tokenizer).subject
    stars = f"scenes:single?style=plain&size=32&colours=red&shapes=star&n={COUNT}"
    few = source(f"{stars}&seed={seed + 7}")
    kept = source(f"{stars}&seed={test_seed}", split="test")
    real = learned.read_images([kept[i]["image"] for i in range(COUNT)])

    plain = base.feed.text
    assert plain is not None
    text = WordsPlan(vocab=plain.vocab, length=plain.length, new=(("<it>", 1),))
    tokenizer = words(base.but(**{"feed.text": text}), train)
    coarse = tuple(i for i in tokenizer(COARSE)[0].tolist() if i not in (tokenizer.start, tokenizer.end))
    tiny = textual_inversion.tiny()
    preset = tiny.but(config=TextualInversion.Config(**lent_fields(base.config) | {"drop": 0.0}, like=coarse), starts=()).but(**{
        "feed.text": text, "stages.0.steps": learn, "stages.0.batch_size": 16})
    data = concept([few[i]["image"] for i in range(5)], "<it>", ("a {}", "a picture of a {}", "there is a {}"))

    def lend(system: torch.nn.Module) -> None:
        system.load_state_dict({k: v for k, v in learned.system.state_dict().items() if k in system.state_dict()}, strict=False)

    subject = train_arm("textual_inversion", preset, data, needs=("image", "text"), seed=seed, tokenizer=tokenizer, prepare=lend).subject

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
