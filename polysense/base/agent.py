"""Agents chain other systems. They hold no weights and know their helpers only by capability."""
from abc import ABC
from dataclasses import dataclass
from typing import Any

from polysense.base.catalogue import preset_of
from polysense.base.protocols import fulfils
from polysense.base.spec import Configured, Spec


@dataclass(frozen=True, kw_only=True)
class Role(Spec):
    """A seat in an agent: which capability it asks for and which system fills it by default."""
    name: str
    capability: str
    filled_by: str
    preset: str = "tiny"


class Agent(Configured, ABC):
    """Builds its helpers from `c.roles` and refuses one that lacks the capability of its role."""

    def __init__(self, c: Any):
        self.helpers: dict[str, Any] = {}
        for role in c.roles:
            helper = preset_of(role.filled_by, role.preset).config.build()
            if not fulfils(helper, role.capability):
                raise TypeError(f"{role.filled_by} cannot {role.capability}")
            self.helpers[role.name] = helper
