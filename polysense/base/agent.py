"""Agents chain other systems. They hold no weights, know their helpers only by capability, and write down every step they take."""
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from polysense.base.catalogue import catalogue
from polysense.base.errors import UserError
from polysense.base.protocols import CAPABILITIES, fulfils
from polysense.base.spec import Configured, Spec

LONGEST = 4000                               # characters of an observation
Message = dict[str, str]                     # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass(frozen=True, kw_only=True)
class Role(Spec):
    """A seat in an agent: the capability that its helper must have ("a|b": one of them)."""
    name: str
    capability: str


@dataclass(frozen=True)
class Tool:
    """Something an agent can do: `run(request, path of a picture or "") -> text`. `asks`: a regular expression that requests for it fit."""
    name: str
    says: str                                # one line for the planner
    asks: str
    run: Callable[[str, str], str]
    image: str = "needs"                     # "needs" a picture, or ""
    missing: str = ""                        # why it cannot be used here, "" where it can


@dataclass(frozen=True)
class Event:
    """One line of an agent's log. kind: question, thought, action, observation, error, repair, answer."""
    kind: str
    text: str
    tool: str = ""
    image: str = ""

    def to_json(self) -> dict[str, str]:
        return {k: v for k, v in asdict(self).items() if v}


class Planner(Protocol):
    """What decides the next step: a language model, or rules."""

    def complete(self, messages: Sequence[Message]) -> str: ...


class Agent(Configured, ABC):
    """Seats helpers, runs tools so that neither their failure nor their words can take over, and logs all of it."""

    def __init__(self, c: Any):
        self.roles: dict[str, Role] = {r.name: r for r in c.roles}
        for role in self.roles.values():
            if unknown := [k for k in role.capability.split("|") if k not in CAPABILITIES]:
                raise UserError(f"the role {role.name} asks for {unknown[0]!r}, which is no capability", f"they are {', '.join(CAPABILITIES)}")
        self.helpers: dict[str, Any] = {}
        self.log: list[Event] = []

    def seat(self, name: str, helper: Any) -> Self:
        """Gives a role its helper: a Pipeline, or a system. UserError for an unknown role, or a helper that lacks its capability."""
        if name not in self.roles:
            raise UserError(f"{type(self).__name__} has no role {name!r}", f"its roles are {', '.join(self.roles)}")
        wanted = self.roles[name].capability.split("|")
        if not any(fulfils(getattr(helper, "system", helper), k) for k in wanted):
            able = [c.id for c in catalogue().values() if set(wanted) & set(c.can)]
            raise UserError(f"{getattr(helper, 'id', '') or type(helper).__name__} cannot {' or '.join(wanted)}, which the role {name} asks for",
                            f"systems that can: {', '.join(able) or 'none yet'}")
        self.helpers[name] = helper
        return self

    def vacant(self, name: str) -> str:
        """Why a tool that works through this role cannot be used: "" where somebody sits there."""
        return "" if name in self.helpers else f"no {name} is seated"

    @abstractmethod
    def ask(self, question: str, images: Sequence[str] = ()) -> str:
        """A question and the paths of pictures -> the answer; `log` says how it came about."""

    def note(self, kind: str, text: str, tool: str = "", image: str = "") -> Event:
        self.log.append(Event(kind, text, tool, image))
        return self.log[-1]

    def use(self, tool: Tool, request: str, image: str = "") -> str:
        """Runs a tool. Whatever goes wrong becomes an observation that says so; whatever comes back is data, see `contained`."""
        self.note("action", request, tool.name, image)
        if tool.missing:
            return self.note("error", f"{tool.name} is unavailable: {tool.missing}", tool.name, image).text
        try:
            return self.note("observation", contained(tool.run(request, image)), tool.name, image).text
        except Exception as error:           # a tool may fail in any way; the agent goes on and the log keeps the reason
            said = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return self.note("error", contained(f"{tool.name} failed: {said}"), tool.name, image).text


def contained(text: str) -> str:
    """Foreign words made harmless: every line begins with "| ", so that none can pass for a line of the planner's; no control characters; bounded."""
    text = re.sub(r"[^\S\n]|[\x00-\x09\x0b-\x1f\x7f\u0085\u2028\u2029\u200b-\u200f\u202a-\u202e]", " ", str(text).replace("\r\n", "\n"))
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ... (cut)"
    return "\n".join(f"| {line}" for line in text.split("\n"))


def uncontained(text: str) -> str:
    """The words of an observation again, for those that read them as data."""
    return "\n".join(line.removeprefix("| ") for line in text.split("\n"))


def choose(tools: Iterable[Tool], request: str) -> Tool | None:
    """The first tool whose pattern a request fits."""
    return next((t for t in tools if re.search(t.asks, request, re.I)), None)
