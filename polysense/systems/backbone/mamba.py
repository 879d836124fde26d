"""Mamba: a recurrent network that chooses what to remember, trained in parallel.

    h_t = exp(D_t A) h_{t-1} + D_t B_t x_t,      y_t = C_t h_t + D x_t                    (equations 1a, 1b and 4)

A is diagonal, N numbers a channel. The step D_t, what is written B_t and what is read C_t are computed from the token itself: a large step forgets
and writes, a small one keeps. A block projects its input to x and z, sends x through a short causal convolution and the recurrence, and gates it
with silu(z); blocks stand in a residual stream of RMSNorms, without attention or positions. In training the recurrence is a scan over all tokens
at once (`nn.scan`), in writing it is one step a token on a state that does not grow. `fixed` takes the choice away: what is left is a convolution.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from polysense.base.card import Card
from polysense.base.system import Batch, Feed, Losses, Optim, Preset, PromptPlan, Spec, Stage, System, final
from polysense.objectives.language import labels_of, next_token
from polysense.towers.mamba import Block, Fixed, Mamba, Mixer
from polysense.weights import mamba_hf

card = Card(
    name="Mamba", paper="Gu & Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023",
    arxiv="2312.00752", year=2023, says="Reads and continues text in time linear in its length, without attention.",
    needs=("text",), can=("encode_text",), official="state-spaces/mamba",
)

PARAMETERS = 129_135_360                     # 130M, embedding and head tied

weights = {"hf": mamba_hf.LAYOUT}

PAD = 0


@final
class MambaLM(System):
    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        language: Mamba.Config

    def __init__(self, c: Config):
        super().__init__()
        self.language = c.language.build()

    def losses(self, batch: Batch) -> Losses:
        """Every next word."""
        text = batch["text"]
        return Losses(language=next_token(self.language.logits(self.language(text).tokens), labels_of(text, text != PAD)))

    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] ids, padded on the right -> [B,D], unit norm: the state of the last real token."""
        return F.normalize(self.language(text, text != PAD).pooled.float(), dim=-1)

    def continue_text(self, text: Tensor, *, max_new: int, end: int | None = None, how: Spec | None = None) -> Tensor:
        """text [B,L] ids, padded on the right -> new ids [B,N], N <= max_new, up to and with `end`. how: as `Mamba.generate`."""
        return self.language.generate(text, text != PAD, max_new=max_new, end=end, how=how)


def _plan(language: Mamba.Config, data: str, stage: Stage) -> Preset:
    return Preset(data=data, config=MambaLM.Config(language=language), stages=(stage,),
                  feed=Feed(text=PromptPlan(vocab=language.vocab, length=language.length)))


def tiny() -> Preset:
    return _plan(Mamba.Config(vocab=1024, length=48, width=96, depth=2), "scenes", Stage(
        objective=MambaLM.losses, steps=300, batch_size=32, optim=Optim(lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), warmup=30, clip=1.0)))


def fixed() -> Preset:
    """`tiny` without the choice: step, write and read are the same for every token."""
    return tiny().but(**{"config.language.block": Block.Config(mixer=Mixer.Config(select=Fixed.Config()))})


def paper() -> Preset:
    """130M on 300 billion tokens of text (section 4.2.1, appendix E.2.1): 0.5 million tokens a batch."""
    return _plan(Mamba.Config(vocab=50_280, length=2048, width=768, depth=24), "pile", Stage(
        objective=MambaLM.losses, steps=600_000, batch_size=256,
        optim=Optim(lr=5 * 6e-4, weight_decay=0.1, betas=(0.9, 0.95), warmup=6000, clip=1.0)))
