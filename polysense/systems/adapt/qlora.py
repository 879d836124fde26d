"""QLoRA: LoRA over a base of four-bit weights.

    Y = X dequant(W_NF4) + s X A^T B^T                                                                       (equation 5)

Every dense layer of every block is stored in NF4, 16 levels at the quantiles of a normal distribution for each block of 64 weights, and the maxima
of the blocks in 8 bits once more: 4.13 bits a weight. Each of these layers has an update; norms, embeddings and the head keep their precision.
Gradients pass through the dequantised weights to X, A and B, never to a code; the optimiser's state may lie in pages of a file
(`Optim(name="paged_adamw")`).

    polysense train llava_1_5 --adapt qlora:rank=16 --base runs/llava --data PHOTOS

The quantiser is `mechanisms/nf4.py`, bit for bit that of bitsandbytes.
"""
from dataclasses import dataclass

from polysense.archetypes.language_model import LanguageModel, llama_7b, tiny_language
from polysense.base.card import Card
from polysense.base.system import Feed, Optim, Preset, PromptPlan, Stage, Start, final
from polysense.mechanisms.nf4 import QuantisedLowRank

card = Card(
    name="QLoRA", paper="Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023",
    arxiv="2305.14314", year=2023, says="Fine-tunes over frozen weights of four bits, so that large models fit into small memory: --adapt qlora.",
    needs=("text",), can=(), official="artidoro/qlora",
)

PARAMETERS = 3_660_320_768 - 3_238_002_688   # the authors' log of LLaMA 7B with r=64, less the packed codes, which are buffers here

adapter = QuantisedLowRank                   # what `--adapt qlora` puts on other systems


@final
class QLoRA(LanguageModel):
    @dataclass(frozen=True, kw_only=True)
    class Config(LanguageModel.Config):
        pass


def tiny() -> Preset:
    """On the language model of `lora`, in four bits: titles of shop photographs."""
    return Preset(
        data="fashion_products", config=QLoRA.Config(language=tiny_language(), adapter=QuantisedLowRank(rank=4, alpha=None, dropout=0.0)),
        feed=Feed(text=PromptPlan(vocab=2048, length=48)), starts=(Start(into="language", from_="lora", take="language", preset="base"),),
        stages=(Stage(objective=QLoRA.losses, trainable=("*.lora.*",), steps=200, batch_size=32,
                      optim=Optim(name="paged_adamw", lr=5e-3, warmup=20, clip=1.0)),))


def llama() -> Preset:
    """LLaMA 7B on its own, which `paper` adapts: a million million tokens in batches of four million (Touvron et al. 2023, section 2.3)."""
    return Preset(
        data="llama_mixture", config=QLoRA.Config(language=llama_7b()), feed=Feed(text=PromptPlan(kind="llama", vocab=32_000, length=2048)),
        stages=(Stage(objective=QLoRA.losses, steps=250_000, batch_size=2048, checkpoint_activations=True, optim=Optim(
            lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), warmup=2000, final=0.1, clip=1.0)),))


def paper() -> Preset:
    """LLaMA 7B on OASST1 (appendix B.2): r=64, alpha 16, dropout 0.1, lr 2e-4 constant, 1875 steps of batch 16."""
    return Preset(
        data="oasst1", config=QLoRA.Config(language=llama_7b(), adapter=QuantisedLowRank()),
        feed=Feed(text=PromptPlan(kind="llama", vocab=32_000, length=512)),
        starts=(Start(into="language", from_="qlora", take="language", preset="llama"),),
        stages=(Stage(objective=QLoRA.losses, trainable=("*.lora.*",), steps=1875, batch_size=16, checkpoint_activations=True, optim=Optim(
            name="paged_adamw", lr=2e-4, betas=(0.9, 0.999), schedule="constant", warmup=56, clip=0.3)),))
