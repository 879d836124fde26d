"""A language model behind soft prompts that something else makes of a picture. Abstract: a system adds its objectives and is final.

Shapes: B batch, Q soft prompts, L tokens of text, D width of the language model.
"""
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.base.system import Spec, System
from polysense.objectives.language import IGNORE, labels_of, next_token
from polysense.towers.causal_lm import CausalLM
from polysense.towers.seq2seq import Seq2Seq


class PromptedLM(System):
    """`language` and `to_language`, the linear map into its word embeddings; both None where a system has no language model (yet).

    A CausalLM reads soft prompts, start token, `prompt` and text in one row. A Seq2Seq reads soft prompts and the first words of the text,
    with an end behind them, in its encoder, and writes the rest; `prompt` is what it is given to begin a caption with.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        language: CausalLM.Config | Seq2Seq.Config | None = None
        start: int                           # ids of the language model's tokens
        end: int
        prompt: tuple[int, ...] = ()         # what stands before every caption

    def __init__(self, c: Config, width: int, pad: int):
        """width: of what `soft_prompt` projects; pad: id of padding."""
        super().__init__()
        self.language: Any = c.language.build() if c.language is not None else None
        self.to_language: Any = nn.Linear(width, c.language.width) if c.language is not None else None
        self.start, self.end, self.pad, self.prompt = c.start, c.end, pad, c.prompt

    @abstractmethod
    def soft_prompt(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,Q,D]."""

    @property
    def speaker(self) -> CausalLM | Seq2Seq:
        if self.language is None:
            raise UserError(f"this {type(self).__name__} has only its first stage: no language model", "use a preset or checkpoint of stage 2")
        return self.language

    def nll(self, text: Tensor, prefix: Tensor | None) -> Tensor:
        """Mean -log p of the words of text [B,L] behind soft prompts [B,Q,D]. Soft prompts, the start token, `prompt` and padding count nothing.

        A Seq2Seq is given the first words of each text, as many as a die says (Li et al. 2023, section 3.3); the rest and the end count.
        """
        lm = self.speaker
        if isinstance(lm, Seq2Seq):
            words, n = text[:, 1:], (text[:, 1:] != self.pad).sum(1, keepdim=True)
            given = (torch.rand(n.shape, device=n.device) * n).long()
            rest, real = moved(words, given, n - given, self.pad)
            label = torch.cat([text.new_full((len(text), 1), IGNORE), rest.masked_fill(~real, IGNORE)], 1)
            return next_token(lm.predict(rest, *self._asked(words, given, prefix)), label)
        given = text.new_tensor(self.prompt).expand(len(text), -1)
        text = torch.cat([text[:, :1], given, text[:, 1:]], 1)
        real = text != self.pad
        label = labels_of(text, real)
        label[:, :1 + len(self.prompt)] = IGNORE
        soft = lm.embed(text[:, :0]) if prefix is None else prefix
        x, mask = lm.join(soft, text, real)
        label = torch.cat([label.new_full((len(text), soft.shape[1]), IGNORE), label], 1)
        return next_token(lm.logits(lm.read(x, mask)), label)

    def _asked(self, words: Tensor, n: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        """What an encoder is given: soft prompts, the first n [B,1] of words [B,L] and an end -> x [B,S,D], mask [B,S]."""
        lm, (text, real) = self.speaker, moved(words, torch.zeros_like(n), n + 1, self.pad)
        return lm.join(lm.embed(text[:, :0]) if prefix is None else prefix, text.scatter(1, n, self.end), real)  # type: ignore[return-value]

    @torch.no_grad()
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int, how: Spec | None = None) -> Tensor:
        """image [B,3,H,W], prompt [B,L] ids that begin with the start token -> new ids [B,N], N <= max_new, up to and with the end, then padding.

        An end token in the prompt is passed over: the language model goes on from the words before it. Behind the start token alone stands
        `prompt` of the configuration. how: a strategy of `towers.decoding`, greedy by default.
        """
        lm = self.speaker
        real = (prompt != self.pad) & (prompt != self.end)
        real[:, 0] = True
        if self.prompt and int(real.sum(1).max()) == 1:
            given = prompt.new_tensor(self.prompt).expand(len(prompt), -1)
            prompt, real = torch.cat([prompt[:, :1], given], 1), torch.cat([real[:, :1], torch.ones_like(given, dtype=torch.bool)], 1)
        if isinstance(lm, Seq2Seq):
            x, mask = self._asked(prompt[:, 1:], real[:, 1:].sum(1, keepdim=True), self.soft_prompt(image))
        else:
            kept = int(real.sum(1).max())
            x, mask = lm.join(self.soft_prompt(image), prompt[:, :kept], real[:, :kept])  # type: ignore[assignment]
        return lm.generate(x, mask, max_new=max_new, end=self.end, pad=self.pad, how=how)


def moved(text: Tensor, start: Tensor, n: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """The n [B,1] tokens from `start` [B,1] on of each row of text [B,L] -> ids [B,M] with `pad` behind them, and which of them are real."""
    at = torch.arange(int(n.max()) if len(n) else 0, device=text.device)
    real = at < n
    wide = torch.cat([text, text.new_full((len(text), 1), pad)], 1)
    return wide.gather(1, (start + at).clamp(max=text.shape[1])).masked_fill(~real, pad), real
