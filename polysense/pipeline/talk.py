"""Words about pictures: captions, answers, conversations, by any system with `generate_text`."""
from collections.abc import Sequence
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import ChatPlan, EpisodePlan, Preset, PromptPlan
from polysense.base.spec import Spec, from_dict
from polysense.data.chat import Chat, Turn, episode_ids
from polysense.train.precision import autocast

MOST = 64                                             # new tokens, where nothing else is said


class Writes(Protocol):
    """What `Talk` needs of the class it is mixed into."""
    system: Any
    preset: Preset
    tokenizer: Any
    device: torch.device
    id: str

    def read_images(self, images: Sequence[Any]) -> Tensor: ...
    def read_texts(self, texts: Sequence[str]) -> Tensor: ...
    def _need(self, *capabilities: str) -> None: ...


def strategy(text: str, seed: int = 0) -> Spec | None:
    """How words are chosen: "greedy" (the likeliest), "beam:5" (beam search), "sample:0.9" (from the nucleus of that probability).

    Raises UserError for anything else.
    """
    name, _, number = text.partition(":")
    try:
        if name == "greedy" and not number:
            return None
        if name == "beam":
            return from_dict({"is": "polysense.towers.decoding:Beam.Config", "beams": int(number or 5)})
        if name == "sample":
            return from_dict({"is": "polysense.towers.decoding:Nucleus.Config", "top_p": float(number or 0.9), "seed": seed})
    except ValueError:
        pass
    raise UserError(f"no way of writing called {text!r}", "choose greedy, beam:5 or sample:0.9")


def write(pipeline: Writes, images: Sequence[Any], conversations: Sequence[Sequence[Turn]], *, max_new: int = MOST, how: str = "greedy",
          seed: int = 0, batch_size: int = 16) -> list[str]:
    """The reply to the open last turn of each conversation about each picture. Raises UserError for what the system cannot do."""
    pipeline._need("generate_text")
    if len(images) != len(conversations) or not len(images):
        raise UserError(f"{len(images)} pictures and {len(conversations)} texts", "give one text for every picture, and at least one")
    if any(not said or said[-1][1] is not None or not str(said[-1][0]).strip() for said in conversations):
        raise UserError("there is nothing to reply to", "say something")
    if max_new < 1:
        raise UserError(f"max_new={max_new}", "ask for at least one token")
    chosen, options = strategy(how, seed), {}
    if chosen is not None:
        if "how" not in signature(pipeline.system.generate_text).parameters:
            raise UserError(f"{pipeline.id or 'this system'} writes in its own way", "leave how= out")
        options = {"how": chosen}
    return _batched(pipeline, images, [prompt_of(pipeline, said) for said in conversations], max_new, options, batch_size)


def _batched(pipeline: Writes, images: Sequence[Any], prompts: list[list[int]], max_new: int, options: dict[str, Any], batch_size: int) -> list[str]:
    out: list[str] = []
    for start in range(0, len(images), batch_size):
        rows, pad = prompts[start:start + batch_size], int(getattr(pipeline.tokenizer, "pad", 0))
        wide = max(len(r) for r in rows)
        ids = torch.tensor([r + [pad] * (wide - len(r)) for r in rows], dtype=torch.int64, device=pipeline.device)
        with torch.inference_mode(), autocast("auto", pipeline.device)(True):
            new = pipeline.system.generate_text(pipeline.read_images(images[start:start + batch_size]), ids, max_new=max_new, **options)
        out += [pipeline.tokenizer.decode(row) for row in new.cpu()]
    return out


def _shown(pipeline: Writes, images: Sequence[Any], examples: Sequence[tuple[Any, str]], max_new: int, how: Spec | None,
           batch_size: int) -> list[str]:
    """Few-shot: the examples, then the picture, then what the system writes."""
    plan = pipeline.preset.feed.text
    if not isinstance(plan, EpisodePlan):
        raise UserError(f"{pipeline.id or 'this system'} reads one picture at a time", "leave the examples out, or use flamingo")
    said = episode_ids(plan, pipeline.tokenizer, [[*(text for _, text in examples), None]])
    if int((said == plan.image).sum()) != len(examples) + 1:
        raise UserError(f"{len(examples)} examples do not fit the {plan.length} tokens that are read", "give fewer, or shorter ones")
    options = {} if how is None else {"how": how}
    shots, out = pipeline.read_images([picture for picture, _ in examples]), list[str]()
    for start in range(0, len(images), batch_size):
        query = pipeline.read_images(images[start:start + batch_size])
        both = torch.cat([shots.expand(len(query), *shots.shape), query[:, None]], 1)
        with torch.inference_mode(), autocast("auto", pipeline.device)(True):
            new = pipeline.system.generate_text(both, said.to(pipeline.device).expand(len(query), -1), max_new=max_new, **options)
        out += [pipeline.tokenizer.decode(row) for row in new.cpu()]
    return out


def prompt_of(pipeline: Writes, turns: Sequence[Turn]) -> list[int]:
    """The ids of a conversation with an open last turn, as the system's feed puts it.

    A ChatPlan has a template for turns; elsewhere what was said and replied before stands in front of the question. An empty question asks
    for a caption.
    """
    plan = pipeline.preset.feed.text
    if isinstance(plan, ChatPlan):
        return Chat(plan, pipeline.tokenizer).row(turns)[0]
    ask = plan.ask if isinstance(plan, PromptPlan) else "{}"
    text = " ".join(f"{ask.format(said)} {reply or ''}".strip() for said, reply in turns)
    return pipeline.read_texts([text])[0].tolist()


class Talk:
    """The verbs of a Pipeline that answer in words."""

    def caption(self: Any, images: Any, *, examples: Sequence[tuple[Any, str]] = (), max_new: int = MOST, how: str = "greedy", seed: int = 0,
                batch_size: int = 16) -> list[str]:
        """One caption a picture (paths, PIL pictures, arrays or addresses). how: "greedy", "beam:5" or "sample:0.9", the last by `seed`.

        examples: (picture, text) pairs that show what is wanted, for systems that read pictures and texts in turn (Flamingo): the texts may
        be captions, answers, anything. Raises UserError where the system reads one picture only.
        """
        from polysense.pipeline import _listed

        listed, plan = _listed(images), self.preset.feed.text
        self._need("generate_text")
        describe = plan.describe if isinstance(plan, PromptPlan) else ""
        if examples:
            return _shown(self, listed, examples, max_new, strategy(how, seed), batch_size)
        if isinstance(plan, ChatPlan):
            return write(self, listed, [[(describe, None)]] * len(listed), max_new=max_new, how=how, seed=seed, batch_size=batch_size)
        if not listed:
            raise UserError("there are no pictures", "give at least one")
        chosen = strategy(how, seed)
        options = {"how": chosen} if chosen is not None else {}
        return _batched(self, listed, [self.read_texts([describe])[0].tolist()] * len(listed), max_new, options, batch_size)

    def ask(self: Any, image: Any, question: str, *, max_new: int = MOST, how: str = "greedy", seed: int = 0) -> str:
        """The answer to a question about a picture."""
        return write(self, [image], [[(question, None)]], max_new=max_new, how=how, seed=seed)[0]

    def chat(self: Any, image: Any, messages: Sequence[Any], *, max_new: int = 256, how: str = "greedy", seed: int = 0) -> str:
        """The next reply of a conversation about a picture.

        messages: what was said, strings in turn, the user first and last; or {"role": "user" | "assistant", "content": str} dicts.
        """
        return write(self, [image], [turns_of(messages)], max_new=max_new, how=how, seed=seed)[0]


def turns_of(messages: Sequence[Any]) -> list[Turn]:
    """Strings in turn, or role-and-content dicts, as (said, replied) pairs with an open last one. Raises UserError for another order."""
    said: list[str] = []
    for n, message in enumerate(messages):
        role = ("user", "assistant")[n % 2]
        if isinstance(message, dict) and message.get("role") != role:
            raise UserError(f"message {n + 1} is of {message.get('role')!r}", "user and assistant take turns, the user begins")
        content = message.get("content") if isinstance(message, dict) else message
        if not isinstance(content, str):
            raise UserError(f"message {n + 1} is {type(content).__name__}, no text", "give strings, or dicts with role and content")
        said.append(content)
    if len(said) % 2 == 0:
        raise UserError("the last message is not of the user" if said else "there is nothing to reply to", "end with what the user says")
    return [*zip(said[:-1:2], said[1::2], strict=True), (said[-1], None)]
