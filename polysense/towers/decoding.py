"""How text is written token by token, once for every model that writes: greedy, nucleus and beam search.

A model hands in the logits of the first new token and a `Writer`: whatever reads one more token for each sequence (`CausalLM.start` and
`write` make one from a key-value cache; a decoder with cross-attention makes its own). Shapes: B sequences, V vocabulary, N new tokens.
"""
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import Configured, Spec


class Writer(Protocol):
    """Reads on, one token a sequence a step."""

    def __call__(self, token: Tensor, /) -> Tensor:
        """token [B] ids, the newest of each sequence -> logits [B,V] of the next."""
        ...

    def pick(self, rows: Tensor, /) -> None:
        """Keeps, repeats or reorders the sequences: rows [B'] of the present ones."""
        ...


class Greedy(Configured):
    """The likeliest token at every step."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        pass

    def __call__(self, logits: Tensor, writer: Writer, *, max_new: int, end: int | None, pad: int = 0) -> Tensor:
        """logits [B,V] of the first new token -> ids [B,N], N <= max_new: up to and with `end`, then `pad`. None of an `end`: max_new tokens."""
        return _one_by_one(lambda x: x.argmax(-1), logits, writer, max_new, end, pad)


class Nucleus(Configured):
    """Sampling from the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020, section 3.1), at a temperature."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        top_p: float = 0.9
        temperature: float = 1.0
        top_k: int = 0                       # of them at most so many; 0: no limit
        seed: int = 0

    def __init__(self, c: Config):
        if not 0 < c.top_p <= 1 or c.temperature <= 0:
            raise UserError(f"top_p={c.top_p}, temperature={c.temperature}", "top_p lies in (0, 1], the temperature above 0 (Greedy is its limit)")
        self.c = c

    def __call__(self, logits: Tensor, writer: Writer, *, max_new: int, end: int | None, pad: int = 0) -> Tensor:
        """As Greedy's; the same seed gives the same text."""
        generator = torch.Generator(logits.device).manual_seed(self.c.seed)
        return _one_by_one(lambda x: torch.multinomial(self.chances(x), 1, generator=generator)[:, 0], logits, writer, max_new, end, pad)

    def chances(self, logits: Tensor) -> Tensor:
        """logits [B,V] -> probabilities [B,V] to draw from, zero outside the nucleus."""
        p, order = (logits.float() / self.c.temperature).softmax(-1).sort(-1, descending=True)
        out = p.cumsum(-1) - p >= self.c.top_p                         # what comes before it is enough already; the first always stays
        if self.c.top_k:
            out[:, self.c.top_k:] = True
        p = p.masked_fill(out, 0.0)
        return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


class Beam(Configured):
    """Beam search: the `beams` likeliest beginnings are followed; a finished text scores log p / length ** length_penalty."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        beams: int = 5
        length_penalty: float = 1.0

    def __init__(self, c: Config):
        if c.beams < 1:
            raise UserError(f"{c.beams} beams", "follow at least one")
        self.c = c

    def length(self, words: int) -> float:
        """Hook: what the log-probability of a text of so many words is divided by."""
        return words ** self.c.length_penalty

    def __call__(self, logits: Tensor, writer: Writer, *, max_new: int, end: int | None, pad: int = 0) -> Tensor:
        """As Greedy's: the best text of each sequence.

        It ends when no running beam, scored at its present length, beats the worst of `beams` finished ones, or after max_new tokens.
        """
        k, (b, v), device = self.c.beams, logits.shape, logits.device
        base = torch.arange(b, device=device)[:, None] * k                                   # first row of each sequence
        writer.pick(torch.arange(b, device=device).repeat_interleave(k))
        running = torch.full((b, k), -torch.inf, device=device)
        running[:, 0] = 0.0                                                                    # all beams are the same text as yet
        text = torch.full((b, k, max_new), pad, device=device)
        done, done_text = torch.full((b, k), -torch.inf, device=device), text.clone()
        logits = logits.repeat_interleave(k, 0)
        for n in range(max_new):
            score = running[..., None] + logits.float().log_softmax(-1).unflatten(0, (b, k))
            best, place = score.flatten(1).topk(min(2 * k, k * v), -1)                         # k of them at least do not end
            beam, token = place // v, place % v
            ends = token == end if end is not None else torch.zeros_like(token, dtype=torch.bool)
            grown = text.gather(1, beam[..., None].expand(-1, -1, max_new)).clone()
            grown[..., n] = token
            over = torch.full_like(ends, n == max_new - 1)
            stops = ends | over if n == max_new - 1 else ends
            stops = stops & (torch.arange(stops.shape[1], device=device) < k)                  # an end counts only among the k best
            worth = (best / self.length(n + 1)).masked_fill(~stops, -torch.inf)
            done, keep = torch.cat([done, worth], 1).topk(k, -1)
            done_text = torch.cat([done_text, grown], 1).gather(1, keep[..., None].expand(-1, -1, max_new))
            running, order = best.masked_fill(ends, -torch.inf).topk(k, -1)
            if n == max_new - 1 or bool((running[:, 0] / self.length(n + 1) <= done[:, -1]).all()):
                break
            text = grown.gather(1, order[..., None].expand(-1, -1, max_new))
            writer.pick((base + beam.gather(1, order)).flatten())
            logits = writer(token.gather(1, order).flatten())
        return _trimmed(done_text[:, 0], end, pad)


class SmoothBeam(Beam):
    """Beam search whose short texts are penalised less: log p / ((5 + length) / 6) ** length_penalty (Wu et al. 2016, equation 14)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Beam.Config):
        beams: int = 4
        length_penalty: float = 0.6          # Vaswani et al. 2017, section 6.1

    def length(self, words: int) -> float:
        return ((5 + words) / 6) ** self.c.length_penalty


def _one_by_one(choose, logits: Tensor, writer: Writer, max_new: int, end: int | None, pad: int) -> Tensor:  # type: ignore[no-untyped-def]
    out, open_ = [], torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    for n in range(max_new):
        token = torch.where(open_, choose(logits), pad)
        out.append(token)
        if end is not None:
            open_ = open_ & (token != end)
            if not bool(open_.any()):
                break
        if n < max_new - 1:
            logits = writer(token)
    return torch.stack(out, 1) if out else logits.new_zeros((len(logits), 0), dtype=torch.long)


def _trimmed(text: Tensor, end: int | None, pad: int) -> Tensor:
    """[B,N] cut after the longest text; behind an end nothing but `pad`."""
    if end is None:
        return text
    behind = (text == end).int().cumsum(1) - (text == end).int() > 0
    text = text.masked_fill(behind, pad)
    return text[:, :max(1, int((~behind).sum(1).max()))]
