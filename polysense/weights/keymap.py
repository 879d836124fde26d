"""Checkpoints as tables: `their.{i}.name -> our.{i}.name`, with a named, invertible operation where the shapes differ.

One table serves both ways: `load` turns their state into ours, `save` turns ours into theirs. In a pattern, a placeholder of one letter
stands for a number and `{i+1}` for that number plus one, a longer one (`{rest}`) for any text; all patterns of a rule use the same ones.
"""
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.weights.signs import hint

State = dict[str, Tensor]
Tensors = list[Tensor]


@dataclass(frozen=True)
class Op:
    """A named operation on the tensors of one rule, and its exact inverse."""
    name: str
    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]


def _parts(t: Tensor, n: int) -> Tensors:
    if not t.ndim or t.shape[0] % n:
        raise ValueError(f"its first axis does not split into {n}")
    return list(t.chunk(n))


def _squeeze(t: Tensor, n: int) -> Tensor:
    if t.ndim <= n or any(s != 1 for s in t.shape[:n]):
        raise ValueError(f"it has no {n} leading axes of length one")
    return t.reshape(t.shape[n:])


def _matrix(t: Tensor) -> Tensor:
    if t.ndim != 2:
        raise ValueError("it is not a matrix")
    return t.T


def stack(n: int) -> Op:
    """One of theirs is n of ours of equal length, one below the other."""
    return Op(f"stack{n}", lambda t: _parts(t[0], n), lambda t: [torch.cat(t)])


def split(n: int) -> Op:
    """n of theirs are one of ours: the inverse of `stack(n)`."""
    return Op(f"split{n}", lambda t: [torch.cat(t)], lambda t: _parts(t[0], n))


def _equal(tensors: Tensors) -> Tensor:
    if any(t.shape != tensors[0].shape or not torch.equal(t, tensors[0]) for t in tensors[1:]):
        raise ValueError("its copies differ")
    return tensors[0]


same = Op("same", lambda t: t, lambda t: t)


def ties(n: int, op: Op = same) -> Op:
    """n of theirs are copies of one; what that one is of ours, `op` says."""
    return Op(f"tied{n}", lambda t: op.load([_equal(t)]), lambda t: op.save(t) * n)


stack3 = stack(3)                                                                                  # a fused qkv and our q, k, v
transpose = Op("transpose", lambda t: [_matrix(t[0])], lambda t: [_matrix(t[0])])                  # x W is x W^T of nn.Linear
lead1 = Op("lead1", lambda t: [t[0][None]], lambda t: [_squeeze(t[0], 1)])                         # [L,D] -> [1,L,D]
lead2 = Op("lead2", lambda t: [t[0][None, None]], lambda t: [_squeeze(t[0], 2)])                   # [D] -> [1,1,D]
tied = ties(2)                                                                                     # two of theirs are the same one of ours
flat = Op("flat", lambda t: [t[0].reshape(-1)], lambda t: [t[0][None, None]])                      # [1,1,D] -> [D]
scalar = Op("scalar", lambda t: [t[0].reshape(())], lambda t: [t[0]])                              # [1] or [] -> []


@dataclass(frozen=True)
class Rule:
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op = same


def rule(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], op: Op = same) -> Rule:
    """One line of a table."""
    return Rule((theirs,) if isinstance(theirs, str) else theirs, (ours,) if isinstance(ours, str) else ours, op)


def both(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The weight and the bias (where there is one) of a linear, a convolution or a norm."""
    return tuple(rule(f"{theirs}.{p}", f"{ours}.{p}") for p in ("weight", "bias"))


def batch_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Parameters and running statistics of a batch norm."""
    return (*both(theirs, ours), *(rule(f"{theirs}.{p}", f"{ours}.{p}") for p in ("running_mean", "running_var", "num_batches_tracked")))


HOLE = re.compile(r"\{(\w+)(?:\+(\d+))?\}")


@cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], dict[str, int]]:
    """The regular expression of a pattern and, for each letter, what is added to its number."""
    out, at, plus = "", 0, dict[str, int]()
    for m in HOLE.finditer(pattern):
        name = m[1]
        out += re.escape(pattern[at:m.start()])
        out += f"(?P={name})" if name in plus else f"(?P<{name}>{'[0-9]+' if len(name) == 1 else '.*'})"
        plus[name], at = int(m[2] or 0), m.end()
    return re.compile(out + re.escape(pattern[at:])), plus


def _match(pattern: str, key: str) -> dict[str, str] | None:
    """What the placeholders stand for, or None where the key is another."""
    expression, plus = _compiled(pattern)
    m = expression.fullmatch(key)
    if m is None:
        return None
    out = {k: str(int(v) - plus[k]) if len(k) == 1 else v for k, v in m.groupdict().items()}
    return None if any(len(k) == 1 and v.startswith("-") for k, v in out.items()) else out


def _fill(pattern: str, values: dict[str, str]) -> str:
    return HOLE.sub(lambda m: str(int(values[m[1]]) + int(m[2] or 0)) if len(m[1]) == 1 else values[m[1]], pattern)


def rename(key: str, old: str, new: str) -> str:
    """The key under its new name, if it fits the pattern `old`."""
    values = _match(old, key)
    return key if values is None else _fill(new, values)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@dataclass(frozen=True)
class KeyMap:
    """A two-way, total table of names.

    `drop`: regular expressions of their keys that carry no weight of ours (position ids, heads that ours has not); they are not written
    back. `alias`: (other name, name in `rules`) pairs, other names that files or libraries have for the same thing; applied before the rules,
    on load only, one after the other. `own`: regular expressions of our keys that their files have no name for (schedules, queues): they are
    not written, and keep on load what the system was built with.
    """
    rules: tuple[Rule, ...]
    drop: tuple[str, ...] = ()
    alias: tuple[tuple[str, str], ...] = ()
    own: tuple[str, ...] = ()

    def at(self, theirs: str = "", ours: str = "") -> "KeyMap":
        """The same table one level down: every name of theirs below `theirs`, every name of ours below `ours`."""
        return KeyMap(tuple(Rule(tuple(_join(theirs, n) for n in r.theirs), tuple(_join(ours, n) for n in r.ours), r.op) for r in self.rules),
                      tuple(re.escape(theirs + ".") + d if theirs else d for d in self.drop),
                      tuple((_join(theirs, a), _join(theirs, b)) for a, b in self.alias),
                      tuple(re.escape(ours + ".") + o if ours else o for o in self.own))

    def __add__(self, other: "KeyMap") -> "KeyMap":
        return KeyMap(self.rules + other.rules, self.drop + other.drop, self.alias + other.alias, self.own + other.own)

    def load(self, state: State) -> State:
        """Their state under our names and in our shapes.

        Raises UserError for a key that no rule and no drop covers (naming the layouts that the file looks like), for a rule some of whose
        keys are absent, and for a tensor that the operation of its rule does not fit.
        """
        dropped = [re.compile(d) for d in self.drop]
        named = State()
        for key, value in state.items():
            name = self._known_as(key)
            if any(d.fullmatch(key) or d.fullmatch(name) for d in dropped):
                continue
            if name in named:
                raise UserError(f"the file has {name} under two names", "take one of them out")
            named[name] = value
        out, used = _apply(((r.theirs, r.ours, r.op.load, r.op.name) for r in self.rules), named)
        if left := [k for k in named if k not in used]:
            raise UserError(f"{_some(left)} {'has' if len(left) == 1 else 'have'} no place in this layout", hint(state))
        return out

    def save(self, state: State) -> State:
        """Our state under their names and in their shapes; the inverse of `load`. Raises UserError for a key that no rule covers."""
        out, used = _apply(((r.ours, r.theirs, r.op.save, r.op.name) for r in self.rules), state)
        if left := [k for k in state if k not in used and not self.keeps(k)]:
            raise UserError(f"this layout has no name for our {_some(left)}", "export to another layout, or from a system of the published form")
        return out

    def keeps(self, ours: str) -> bool:
        """Whether a key of ours is one that their files do not hold."""
        return any(re.fullmatch(o, ours) for o in self.own)

    def theirs(self, ours: str) -> str:
        """What the published files call one of our keys, "" where they have no name for it."""
        for r in self.rules:
            for pattern in r.ours:
                values = _match(pattern, ours)
                if values is not None:
                    return " + ".join(_fill(n, values) for n in r.theirs)
        return ""

    def _known_as(self, key: str) -> str:
        for other, name in self.alias:
            key = rename(key, other, name)
        return key


Line = tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors], str]


def _apply(lines: Iterable[Line], state: State) -> tuple[State, set[str]]:
    """Every line on every set of numbers it fits: what comes out, and the keys that went in."""
    out, used = State(), set[str]()
    for sources, targets, op, name in lines:
        found: dict[tuple[tuple[str, str], ...], None] = {}
        for pattern in sources:
            found |= {tuple(sorted(v.items())): None for v in (_match(pattern, k) for k in state) if v is not None}
        for values in map(dict[str, str], found):
            keys = [_fill(s, values) for s in sources]
            if absent := [k for k in keys if k not in state]:
                raise UserError(f"{_some(absent)} {'is' if len(absent) == 1 else 'are'} missing beside {next(k for k in keys if k in state)}",
                                "the file is incomplete: fetch it again")
            try:
                made = op([state[k] for k in keys])
            except ValueError as error:
                raise UserError(f"{keys[0]} of shape {list(state[keys[0]].shape)} cannot pass {name} ({error})", hint(state)) from error
            used.update(keys)
            out.update(zip([_fill(t, values) for t in targets], made, strict=True))
    return out, used


def _some(names: list[str], most: int = 4) -> str:
    return f"{len(names)} keys ({', '.join(names[:most])}, ...)" if len(names) > most else ", ".join(names)


def load_into(system: torch.nn.Module, keymap: KeyMap, state: State) -> None:
    """Puts their state into a system, in place and strictly: every parameter and buffer is filled, nothing is left over, every shape is equal.

    Values are cast to the system's types (half-precision files load into float32). Only `num_batches_tracked`, a counter that many files
    lack and that no output depends on, may be absent. Raises UserError, before any change, that names both sides.
    """
    ours, target = keymap.load(state), system.state_dict()

    def called(name: str) -> str:
        return f"{name} (theirs: {keymap.theirs(name) or 'none'})"

    absent = [k for k in target if k not in ours and not k.endswith("num_batches_tracked") and not keymap.keeps(k)]
    if absent:
        raise UserError(f"the file lacks {_some([called(k) for k in absent])}",
                        f"it is incomplete or of another form than this {type(system).__name__}; {hint(state)}")
    if left := [k for k in ours if k not in target]:
        raise UserError(f"this {type(system).__name__} has no place for {_some([called(k) for k in left])}",
                        "build it as the file's configuration says")
    if wrong := [k for k, v in ours.items() if v.shape != target[k].shape]:
        first = wrong[0]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{called(first)} has shape {list(ours[first].shape)} in the file and {list(target[first].shape)} here{more}",
                        "build the system with the file's own sizes" + (" (image_size and patch)" if "position" in first else ""))
    system.load_state_dict(ours, strict=False)
