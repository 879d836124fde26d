"""A unified encoder that also answers questions about pictures. Abstract: a system adds its objectives.

Shapes: B batch, L tokens, D width.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polysense.archetypes.unified_encoder import SHARED, UnifiedEncoder
from polysense.base.errors import UserError
from polysense.base.system import After, Batch, Losses, Spec
from polysense.decoders.answers import KnownAnswers
from polysense.objectives.spread import gather, widest
from polysense.towers.multiway import Multiway


class AnsweringEncoder(UnifiedEncoder):
    """The fusion pass, read at the first token of the text: `pooler`, and `answer`, a classifier over the answers that training met."""

    @dataclass(frozen=True, kw_only=True)
    class Config(UnifiedEncoder.Config):
        pooler: Spec                         # TanhHead
        answer: KnownAnswers.Config | None = None

    def __init__(self, c: Config):
        super().__init__(c)
        self.pooler = c.pooler.build()
        self.answer = c.answer.but(width=c.net.width).build() if c.answer is not None else None

    def fused(self, image: Tensor, text: Tensor) -> Tensor:
        """Pairs -> [B,D]: the first token of the text behind the fusion pass, pooled."""
        return self.pooler(self.net(image, text).text[:, 0])

    @property
    def answers(self) -> KnownAnswers:
        if self.answer is None:
            raise UserError(f"this {type(self).__name__} has no head for answers", "train the preset tiny or vqa on data with questions")
        return self.answer

    def reply(self, batch: Batch) -> Losses:
        """Fine-tuning for questions: the answer as a class."""
        answer = batch["answer"]
        said = self.answers.loss(self.fused(batch["image"], batch["question"]), answer)
        return Losses(answer=said).keeping(answer=gather(F.pad(answer, (0, widest(answer.shape[1], answer.device) - answer.shape[1]))))

    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int) -> Tensor:
        """image [B,3,H,W], prompt [B,L] a question -> ids [B,N] of the likeliest known answer, N <= max_new, up to and with the end token."""
        if not bool(self.answers.words.any()):
            raise UserError(f"this {type(self).__name__} knows no answer yet", "train its stage reply on data with questions")
        return self.answers.say(self.fused(image, prompt))[:, :max_new]

    @torch.no_grad()
    def after_step(self, after: After) -> None:
        """Bounds the scale; answers of the step become known."""
        super().after_step(after)
        if "answer" in after.keep:
            self.answers.learn(after.keep["answer"])


def replying(net: Multiway.Config) -> tuple[str, ...]:
    """What `reply` trains: all that the fusion pass reads; the experts for one modality in the last blocks are not asked."""
    below = net.body.depth - net.body.fused
    return (*SHARED, "net.image.*", "net.text.*", "net.body.blocks.*.pair.*", "pooler.*", "answer.*",
            *(f"net.body.blocks.{i}.{n}.*" for i in range(below) for n in ("image", "text")))
