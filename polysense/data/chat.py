"""Conversations as token ids: a ChatPlan's template around turns, with a mask over the replies, which alone are learned."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import ChatPlan, EpisodePlan, PromptPlan, TextPlan
from polysense.data.sources import BadSample, Sample
from polysense.data.tokenizer import clean

Turn = tuple[str, str | None]                # what the user says, what is replied; None: the reply is to be written
OFTEN = 200                                  # the template is in every text, but is told once: so often, then, that its words stay whole
Row = tuple[list[int], list[bool]]           # token ids, and which of them are learned


class Chat:
    """The template of a plan, in the ids of a tokenizer. `batch(rows)` pads; `row(turns)` is one conversation."""

    def __init__(self, plan: TextPlan | None, tokenizer: Any):
        if not isinstance(plan, ChatPlan):
            raise UserError("this system's feed has no template for conversations", "give it a ChatPlan")
        if tokenizer.pad == tokenizer.end or plan.image < tokenizer.vocab:
            raise UserError("padding or the picture's id means something else to this tokenizer", 'pad="zero", and an image id above the vocabulary')
        self.plan, self.tokenizer = plan, tokenizer
        self._fixed = {s: self.words(s) for s in (plan.system, plan.user, plan.assistant)}

    def words(self, text: str) -> list[int]:
        """Token ids without start and end."""
        return self.tokenizer.engine.encode(clean(text), add_special_tokens=False).ids if text else []

    def row(self, turns: Sequence[Turn], picture: str = "before") -> Row:
        """One conversation; the picture stands "before" or "after" what is said first, or nowhere ("").

        It never exceeds the plan's length: later turns are left out whole, a first turn that is too long is cut. Without a last reply it ends
        where that would begin. Raises UserError for no turns and for a question that leaves no room for any reply.
        """
        plan, end = self.plan, self.tokenizer.end
        stop = [end] if plan.stop == "all" else []
        ids = [self.tokenizer.start, *self._fixed[plan.system], *(stop if plan.system else [])]
        learned = [False] * len(ids)
        for n, (said, reply) in enumerate(turns):
            place = [plan.image] if picture and not n else []
            said_ids = [*place, *self.words(said)] if picture == "before" else [*self.words(said), *place]
            asked = [*self._fixed[plan.user], *said_ids, *stop, *self._fixed[plan.assistant]]
            answer = [] if reply is None else [*self.words(reply), end]
            if n and len(ids) + len(asked) + len(answer) > plan.length:
                break
            ids += [*asked, *answer]
            learned += [False] * len(asked) + [True] * len(answer)
        if len(ids) > plan.length and (turns[0][1] is None or not any(learned[:plan.length])):
            raise UserError(f"a question of {len(ids)} tokens leaves no room for a reply", f"the system reads {plan.length}: ask more briefly")
        if not turns:
            raise UserError("a conversation without turns", "say something")
        return ids[:plan.length], learned[:plan.length]

    def batch(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Rows -> ids int64 [B,L] padded on the right, and bool [B,L], True on what is learned."""
        wide = max(len(ids) for ids, _ in rows)
        made = torch.full((len(rows), wide), self.tokenizer.pad, dtype=torch.int64)
        there = torch.arange(wide) < torch.tensor([len(ids) for ids, _ in rows])[:, None]
        learned = torch.zeros_like(there)
        made[there] = torch.tensor(list(chain.from_iterable(ids for ids, _ in rows)), dtype=torch.int64)
        learned[there] = torch.tensor(list(chain.from_iterable(m for _, m in rows)), dtype=torch.bool)
        return made, learned

    def of_questions(self, about: Sample, rng: np.random.Generator | None) -> Row:
        """A sample's own `chat` (pairs in their order), or its questions as turns of one conversation; rng None: the first ones.

        A sample with `picture_free` true has no picture in it.
        """
        pairs: Sequence[Turn] = about.get("chat") or ()
        if not pairs:
            asked = about.get("qa") or [(about["question"], str(about.get("answer", "")))]
            chosen = range(len(asked)) if rng is None else rng.permutation(len(asked))
            pairs = [(f"{asked[i][0]} {self.plan.short}".strip(), asked[i][1]) for i in list(chosen)[:self.plan.turns]]
        return self.row(pairs, "" if about.get("picture_free") else self._place(rng))

    def of_captions(self, about: Sample, rng: np.random.Generator | None) -> Row:
        """One turn: an instruction to describe the picture, and a caption."""
        options, said = self.plan.briefly, [c for c in about["captions"] if c.strip()]
        pick = lambda of: of[0] if rng is None else of[int(rng.integers(len(of)))]
        return self.row([(pick(options), pick(said))], self._place(rng))

    def _place(self, rng: np.random.Generator | None) -> str:
        return "after" if self.plan.place == "either" and rng is not None and rng.random() < 0.5 else "before"


def episodes(plan: EpisodePlan, tokenizer: Any, rows: Sequence[Sequence[Sample]], rngs: Sequence[np.random.Generator | None]) -> Tensor:
    """Ids [B,L] of episodes of samples: start, then picture caption end for each; 0 is padding. A caption is drawn, or the first (rng None).

    Raises UserError for a tokenizer whose ids collide with the plan's.
    """
    said = [[(pick := [c for c in a["captions"] if c.strip()])[int(rng.integers(len(pick))) if rng else 0] for a in row]
            for row, rng in zip(rows, rngs, strict=True)]
    return episode_ids(plan, tokenizer, said, [rng is not None and rng.random() < plan.p_next for rng in rngs])


def episode_ids(plan: EpisodePlan, tokenizer: Any, said: Sequence[Sequence[str | None]], behind: Sequence[bool] = ()) -> Tensor:
    """The same from the texts themselves; a last one of None is left to be written. Longer episodes are cut at the plan's length.

    behind: rows whose pictures stand behind their texts (text end picture).
    """
    if tokenizer.pad == tokenizer.end or plan.image < tokenizer.vocab:
        raise UserError("padding or the picture's id means something else to this tokenizer", 'pad="zero", and an image id above the vocabulary')
    words = lambda text: tokenizer.engine.encode(clean(text), add_special_tokens=False).ids
    shot = lambda t, back: [plan.image] if t is None else [*words(t), tokenizer.end, plan.image] if back else [plan.image, *words(t), tokenizer.end]
    rows = [[tokenizer.start, *chain.from_iterable(shot(t, back) for t in row)][:plan.length]
            for row, back in zip(said, behind or [False] * len(said), strict=True)]
    wide = max(map(len, rows))
    return torch.tensor([row + [tokenizer.pad] * (wide - len(row)) for row in rows], dtype=torch.int64)


def texts_of(source: Any, plan: TextPlan) -> Iterator[str]:
    """What a tokenizer of this plan is trained on: the captions; for systems that write also questions, answers and the template's words."""
    yield from source.captions()
    if not isinstance(plan, PromptPlan):
        return
    fixed = [plan.describe, plan.ask.replace("{}", " ")]
    if isinstance(plan, ChatPlan):
        fixed += [plan.system, plan.user, plan.assistant, plan.short, *plan.briefly]
    yield from (f"{text} " * OFTEN for text in fixed)
    if hasattr(source, "__len__") and {"question", "answer"} & set(source.offers):
        for i in range(len(source)):
            try:
                about = source.about(i)
            except BadSample:
                continue
            for said, reply in about.get("chat") or about.get("qa") or [(about.get("question", ""), about.get("answer", ""))]:
                yield from (said, str(reply))


def box_text(box: Sequence[float], window: tuple[float, float, float, float]) -> str:
    """A box x0 y0 x1 y1 in [0,1] of a picture as words, in the frame that is read (`images.window`): "[0.25, 0.10, 0.75, 0.60]"."""
    x, y, w, h = window[0], window[1], window[2] - window[0], window[3] - window[1]
    moved = ((box[0] - x) / w, (box[1] - y) / h, (box[2] - x) / w, (box[3] - y) / h)
    return "[" + ", ".join(f"{min(1.0, max(0.0, v)):.2f}" for v in moved) + "]"
