"""Prefix-tuning and its kin: a frozen model is steered by a few learned tokens that nobody wrote.

    prefix   keys and values in front of every layer's own, P = MLP(P_small) in training and baked afterwards     (Li & Liang 2021, section 4.3)
    v2       the same without the MLP, for encoders too                                                           (Liu et al. 2022, P-Tuning v2)
    prompt   embeddings in front of the words, nothing deeper                                                     (Lester et al. 2021)
    lstm     embeddings wherever the template puts them, made by an LSTM in training                              (Liu et al. 2021, P-Tuning)

Gradients pass through the frozen model to them; real tokens count positions from behind the prefix, and it adds no term to the loss.

    polysense train clip --adapt prefix_tuning:tokens=8,on=text --data PHOTOS

This row steers the language model of `lora`; the mechanism is `mechanisms/prefix.py`.
"""
from dataclasses import dataclass

from polysense.archetypes.language_model import LanguageModel, gpt2_medium, tiny_language
from polysense.base.card import Card
from polysense.base.system import Feed, Optim, Preset, PromptPlan, Stage, Start, final
from polysense.mechanisms.prefix import VirtualTokens

card = Card(
    name="Prefix-Tuning", paper="Li & Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021",
    arxiv="2101.00190", year=2021, says="Steers a frozen model by learned keys and values or by virtual tokens: --adapt prefix_tuning.",
    needs=("text",), can=(), official="XiangLi1999/PrefixTuning",
)

PARAMETERS = 354_823_168 + 5 * 1024 + 1025 * 512 + 513 * 49_152      # GPT-2 medium and, in training, the network that makes 5 prefixes

adapter = VirtualTokens                      # what `--adapt prefix_tuning` puts on other systems


@final
class PrefixTuning(LanguageModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(LanguageModel.Config):
        pass


def _tiny(tokens: VirtualTokens, lr: float, trainable: str = "language.soft.*") -> Preset:
    return Preset(
        data="fashion_products", config=PrefixTuning.Config(language=tiny_language(), adapter=tokens),
        feed=Feed(text=PromptPlan(vocab=2048, length=48)), starts=(Start(into="language", from_="lora", take="language", preset="base"),),
        stages=(Stage(objective=PrefixTuning.losses, trainable=(trainable,), steps=200, batch_size=32,
                      optim=Optim(lr=lr, warmup=20, clip=1.0)),))


def tiny() -> Preset:
    """Eight keys and values in each layer, reparametrised."""
    return _tiny(VirtualTokens(tokens=8, hidden=64), 5e-3, "virtual.*")


def tiny_v2() -> Preset:
    """P-Tuning v2: the same, learned as they are."""
    return _tiny(VirtualTokens(tokens=8), 1e-2, "virtual.*")


def tiny_prompt() -> Preset:
    """Prompt tuning: eight embeddings, begun as words."""
    return _tiny(VirtualTokens(tokens=8, kind="prompt", like=tuple(range(300, 308))), 3e-2)


def tiny_lstm() -> Preset:
    """P-Tuning: four embeddings before and four behind the first word, made by an LSTM."""
    return _tiny(VirtualTokens(tokens=8, kind="lstm", at=(0, 0, 0, 0, 2, 2, 2, 2)), 5e-3)


def paper() -> Preset:
    """GPT-2 medium on WebNLG (section 6 and appendix A): prefixes of 5, middle size 512, AdamW at 5e-5, five epochs of batch 5."""
    return Preset(
        data="webnlg", config=PrefixTuning.Config(language=gpt2_medium(), adapter=VirtualTokens(tokens=5, hidden=512)),
        feed=Feed(text=PromptPlan(vocab=50257, length=512)), starts=(Start(into="language", from_="lora", take="language", preset="gpt2"),),
        stages=(Stage(objective=PrefixTuning.losses, trainable=("virtual.*",), steps=5 * 18_025 // 5, batch_size=5,
                      optim=Optim(lr=5e-5, schedule="linear")),))
