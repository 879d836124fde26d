"""LoRA: fine-tuning by a low-rank update beside each frozen weight.

    h = W0 x + (alpha / r) B A x,    A [r, k] random, B [d, r] zero at the start: the adapted model begins as its base          (equation 3)

Only A and B train, on the query and value projections by default; afterwards W = W0 + (alpha / r) B A costs nothing more than the base. Adapters
have names, can be switched and summed, are saved by themselves in peft's files, and go onto any system:

    polysense train clip --adapt lora:rank=8,on="vision.*.q|v" --data PHOTOS

This row adapts a small language model of captions (preset `base`) to captions of another kind; the mechanism is `mechanisms/lora.py`.
"""
from dataclasses import dataclass

from polysense.archetypes.language_model import LanguageModel, gpt2_medium, tiny_language
from polysense.base.card import Card
from polysense.base.system import Feed, Optim, Preset, PromptPlan, Stage, Start, final
from polysense.mechanisms.lora import LowRank

card = Card(
    name="LoRA", paper="Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022",
    arxiv="2106.09685", year=2022, says="Fine-tunes any system through small low-rank updates that can be merged away: --adapt lora.",
    needs=("text",), can=(), official="microsoft/LoRA",
)

PARAMETERS = 355_270_000                     # table 3: GPT-2 medium 354.92M and 0.35M trained

adapter = LowRank                            # what `--adapt lora` puts on other systems


@final
class LoRA(LanguageModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(LanguageModel.Config):
        pass


WORDS = PromptPlan(vocab=2048, length=48)


def base() -> Preset:
    """The language model that is adapted, here and by `qlora` and `prefix_tuning`: it learns captions of photographs."""
    return Preset(
        data="natural_captions", config=LoRA.Config(language=tiny_language()), feed=Feed(text=WORDS),
        stages=(Stage(objective=LoRA.losses, steps=400, batch_size=64, optim=Optim(lr=2e-3, weight_decay=0.05, warmup=40, clip=1.0)),))


def tiny() -> Preset:
    """On `base`: titles of shop photographs."""
    return base().but(
        data="fashion_products", config=LoRA.Config(language=tiny_language(), adapter=LowRank(rank=4)),
        starts=(Start(into="language", from_="lora", take="language", preset="base"),),
        stages=(Stage(objective=LoRA.losses, trainable=("*.lora.*",), steps=200, batch_size=32, optim=Optim(lr=5e-3, warmup=20, clip=1.0)),))


def gpt2() -> Preset:
    """GPT-2 medium on its own, which `paper` adapts. Radford et al. (2019) give neither rate nor steps: these are of the model of that size of
    Brown et al. (2020, table 2.1 and appendix B)."""
    return Preset(
        data="webtext", config=LoRA.Config(language=gpt2_medium()), feed=Feed(text=PromptPlan(vocab=50257, length=1024)),
        stages=(Stage(objective=LoRA.losses, steps=600_000, batch_size=512, checkpoint_activations=True, optim=Optim(
            lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), warmup=750, final=0.1, clip=1.0)),))


def paper() -> Preset:
    """GPT-2 medium on E2E (section 5.4 and table 11): r=4, alpha 32, dropout 0.1, five epochs of batch 8."""
    return Preset(
        data="e2e_nlg", config=LoRA.Config(language=gpt2_medium(), adapter=LowRank(rank=4, alpha=32.0, dropout=0.1)),
        feed=Feed(text=PromptPlan(vocab=50257, length=512)), starts=(Start(into="language", from_="lora", take="language", preset="gpt2"),),
        stages=(Stage(objective=LoRA.losses, trainable=("*.lora.*",), steps=5 * 42_061 // 8, batch_size=8,
                      optim=Optim(lr=2e-4, weight_decay=0.01, warmup=500, schedule="linear")),))
