"""A causal language model with an adapter on it. Abstract: a system names its adapter and is final."""
from dataclasses import dataclass

from torch import Tensor

from polysense.base.system import Batch, Losses, Spec, System
from polysense.nn.attention import Attention
from polysense.nn.block import PreNorm
from polysense.nn.mlp import MLP
from polysense.nn.transformer import Transformer
from polysense.objectives.language import labels_of, next_token
from polysense.towers.causal_lm import CausalLM, LearnedPositions, llama


class LanguageModel(System):
    """`language`, with what `adapter` puts on it (None: nothing yet, which is how the base of the adapted ones is trained).

    Two objectives: every word of `text`, or the replies alone of `chat`. Padding is id 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        language: CausalLM.Config
        adapter: Spec | None = None          # an AdapterConfig of mechanisms.adapter

    def __init__(self, c: Config):
        super().__init__()
        self.language = c.language.build()
        if c.adapter is not None:
            c.adapter.put(self)  # type: ignore[attr-defined]

    def logits(self, text: Tensor) -> Tensor:
        """text [B,L] ids -> [B,L,V]."""
        return self.language.logits(self.language(text, text != 0).tokens)

    def losses(self, batch: Batch) -> Losses:
        """Every next word."""
        text = batch["text"]
        return Losses(language=next_token(self.logits(text), labels_of(text, text != 0)))

    def reply(self, batch: Batch) -> Losses:
        """The words of replies, given all before them."""
        return Losses(language=next_token(self.logits(batch["chat"]), labels_of(batch["chat"], batch["chat_reply"])))


def tiny_language() -> CausalLM.Config:
    """Four blocks of width 128, LLaMA's form."""
    return llama(vocab=2048, length=96, width=128, depth=4, heads=4, hidden=344)


def gpt2_medium() -> CausalLM.Config:
    """GPT-2 medium (Radford et al. 2019): learned positions, tanh GELU, a tied head; 354,823,168 parameters."""
    block = PreNorm.Config(attn=Attention.Config(), mlp=MLP.Config(act="gelu_tanh"))
    return CausalLM.Config(vocab=50257, length=1024, position=LearnedPositions.Config(length=1024, offset=0),
                           body=Transformer.Config(width=1024, depth=24, heads=16, block=block))


def llama_7b() -> CausalLM.Config:
    """LLaMA 7B (Touvron et al. 2023)."""
    return llama(vocab=32_000, length=2048, width=4096, depth=32, heads=32, hidden=11_008)
