"""A planner without a language model: rules that turn a question about pictures into requests, and what was found into an answer.

It knows: arithmetic, what is written, totals, how many, what is left, right, above or below of what, and else describes. Deterministic.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass

from polysense.base.agent import Message, uncontained
from polysense.base.spec import Configured, Spec
from polysense.mechanisms.experts import Found, parsed

HEAD = re.compile(r"^Observation of (\w+)(?: on (.+))?:$")
MONEY = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+)([.]\d{1,2})?(?!\d)")
SUM = re.compile(r"\(*\d[\d.,\s()]*[-+*/×÷][-+*/×÷\d.,\s()]*[\d)]")
WAY = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "over": (1, -1), "below": (1, 1), "under": (1, 1)}
STOP = frozenset(re.findall(r"\w+", """the a an of is are what which does do on in at to with it its and there image picture photo these this that
    thing say says read written text sign signs word words name how many much me i you please side"""))


class Rules(Configured):
    """`complete(messages)` writes one thought and what follows from it, in the words that MM-ReAct's parser reads."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Spec):
        pass

    def __init__(self, c: Config):
        pass

    def complete(self, messages: Sequence[Message]) -> str:
        """The reply to the last message, which names the prompt: objects first, main, or missed."""
        prompt, talk = messages[-1]["content"], messages[:-1]
        last = max((i for i, m in enumerate(talk) if m["content"].startswith("Human: ")), default=-1)
        if last < 0:
            return "AI: I was asked nothing."
        question = talk[last]["content"].split("\n")[0].removeprefix("Human: ")
        images = [p for m in talk if m["content"].startswith("Human: ") for p in m["content"].split("\n")[1:]]
        named = talk[last]["content"].split("\n")[1:] or images                  # pictures of earlier turns are meant where none is given
        seen = observations(talk)
        if sums := SUM.findall(question):                                        # plain arithmetic needs no picture
            done = seen.get(("calculator", ""), "")
            known = done.startswith(f"{sums[0].strip()} = ")
            return f"AI: {done.rpartition('= ')[2]}" if known else f"1. This is a sum.\nAssistant, calculate {sums[0].strip()}"
        wants = expert_for(question)
        lacking = [p for p in named if (wants, p) not in seen]
        if prompt.startswith("Would it help"):
            return "\n".join(ask("objects", p) for p in named if ("objects", p) not in seen) if "objects" in needed(question) else "No."
        if lacking and not prompt.startswith("Did I miss"):
            return "\n".join([f"1. I need the {wants} of {len(lacking)} picture(s).", *(ask(wants, p) for p in lacking)])
        return answer(question, named, seen)


def observations(messages: Sequence[Message]) -> dict[tuple[str, str], str]:
    """(expert, path) -> what it said, of a conversation; the last one counts."""
    out = {}
    for m in messages:
        head, _, said = m["content"].partition("\n")
        if m["role"] == "user" and (hit := HEAD.match(head)):
            out[hit[1], hit[2] or ""] = uncontained(said)
    return out


def needed(question: str) -> set[str]:
    """Experts that a question asks for beside the chief one."""
    return {"objects"} if way(question) and not re.search(r"\babove all\b", question, re.I) else set()


def way(question: str) -> tuple[int, int] | None:
    """(axis, sign) of a word of direction in a question."""
    hit = re.search(r"\b(left|right|above|over|below|under)\b", question, re.I)
    return WAY[hit[1].lower()] if hit else None


def expert_for(question: str) -> str:
    """The expert that a question is about."""
    q = question.lower()
    if re.search(r"\btotal|\bsum\b|cost|price|\bpay|paid|spen[dt]|how much|written|\btext|\bread|\bsays?\b|\bsign|receipt|invoice|\bword", q):
        return "text"
    if re.search(r"\bfaces?\b|people|persons?\b", q):
        return "faces"
    if re.search(r"how many|where|count|objects?\b", q) or way(q):
        return "objects"
    return "caption"


def ask(expert: str, path: str) -> str:
    words = {"text": "what text is in the image?", "faces": "which faces are in the image?", "objects": "what objects are in the image, and where?",
             "caption": "describe the image."}
    return f"Assistant, {words[expert]} {path}"


def answer(question: str, named: Sequence[str], seen: dict[tuple[str, str], str]) -> str:
    """From the observations to a request for arithmetic, or to the answer."""
    wants, q = expert_for(question), question.lower()
    texts = [seen.get((wants, p), "") for p in named]
    if failed := next((t for t in texts if re.match(r"\w+ (is unavailable|failed): ", t)), ""):
        return f"AI: I cannot tell: {failed}"
    found = [f for t in texts for f in parsed(t)]
    if wants == "text" and re.search(r"\btotal|\bsum\b|cost|price|\bpay|paid|spen[dt]|how much", q):
        amounts = [total(parsed(t)) for t in texts]
        if "" in amounts or not amounts:
            return "AI: I found no amount in " + ", ".join(p for p, a in zip(named, amounts, strict=True) if not a)
        done = seen.get(("calculator", ""), "")
        terms = " + ".join(amounts)
        if len(amounts) == 1 or done.startswith(f"{terms} = "):
            return f"AI: The total is {amounts[0] if len(amounts) == 1 else done.rpartition('= ')[2]}."
        return f"2. The amounts are {' and '.join(amounts)}. I let them be added.\nAssistant, calculate {terms}"
    if turned := way(q):
        things = [f for p in named for f in parsed(seen.get(("objects", p), ""))]
        return "AI: " + beside(question, found, things, *turned)
    if wants in ("objects", "faces") and re.search(r"how many|count", q):
        asked = [w.rstrip("s") for w in re.findall(r"[a-z]+", q) if w not in STOP and w != "count"]
        hits = [f for f in found if all(w in f.name.lower() for w in asked)] if wants == "objects" else found
        return f"AI: There are {len(hits)}."
    if wants == "caption":
        return f"AI: {' '.join(t.strip() for t in texts) or 'I see nothing.'}"
    return f"AI: {'; '.join(f.name for f in found) or f'I found no {wants}'}."


def total(lines: Sequence[Found]) -> str:
    """The amount to be paid on a receipt: on the last line that says total, else the largest amount; "" where there is none."""
    def amounts(of: Sequence[Found]) -> list[str]:
        return [m[0].replace(",", "") for f in of for m in MONEY.finditer(f.name)]

    marked = [f for f in lines if re.search(r"\btotal\b", f.name, re.I) and not re.search(r"sub", f.name, re.I)]
    for mark in reversed(marked):
        level = [f for f in lines if f.box[1] < mark.box[3] and mark.box[1] < f.box[3]]          # the amount may stand apart on the same line
        if got := amounts([mark]) or amounts(level):
            return got[-1]
    return max(amounts(lines), key=float, default="")


def beside(question: str, found: Sequence[Found], things: Sequence[Found], axis: int, sign: int) -> str:
    """The nearest finding in a direction from the thing that the question names after the word of direction."""
    tail = re.split(r"\b(?:left|right|above|over|below|under)\b", question, maxsplit=1, flags=re.I)[1]
    words = [w for w in re.findall(r"[a-z0-9]+", tail.lower()) if w not in STOP]
    score = lambda f: sum(w in f.name.lower() for w in words)
    anchor = max([*things, *found], key=score, default=None)
    if anchor is None or not score(anchor):
        return f"I found no {' '.join(words)}."
    middle = lambda f, k: (f.box[k] + f.box[k + 2]) / 2
    others = [f for f in (found or things) if f != anchor and (middle(f, axis) - middle(anchor, axis)) * sign > 0]
    near = min(others, key=lambda f: abs(middle(f, axis) - middle(anchor, axis)) + abs(middle(f, 1 - axis) - middle(anchor, 1 - axis)), default=None)
    return near.name if near else "There is nothing on that side."
