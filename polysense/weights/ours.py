"""Dated renames of our own parameter names, so that runs trained before a rename still open.

A line is written in the change that renames, as in `Rename("2026-09-01", "{head}.fc1.{tail}", "{head}.up.{tail}")`. Lines are applied in
the order of their dates.
"""
from dataclasses import dataclass

from torch import Tensor

from polysense.base.errors import UserError
from polysense.weights.keymap import rename


@dataclass(frozen=True)
class Rename:
    """`old` and `new` are patterns of `weights.keymap`; `date` (ISO) is the day of the change."""
    date: str
    old: str
    new: str


RENAMES: tuple[Rename, ...] = ()


def renamed(state: dict[str, Tensor], renames: tuple[Rename, ...] | None = None) -> dict[str, Tensor]:
    """Our state under today's names (`renames` None: RENAMES). Raises UserError where an old and a new name meet."""
    renames = RENAMES if renames is None else renames
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for line in sorted(renames, key=lambda r: r.date):
            name = rename(name, line.old, line.new)
        if name in out:
            raise UserError(f"the file has {name} under an old and a new name", "it was written by mixed versions: train or export it again")
        out[name] = value
    return out
