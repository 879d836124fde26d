"""Configuration as values: frozen dataclasses that nest like the modules they build."""
import ast
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib import import_module
from types import UnionType
from typing import Any, ClassVar, Self, Union, cast, get_args, get_origin, get_type_hints

from polysense.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Spec:
    owner: ClassVar[type]

    def build(self) -> Any:
        """The object this value describes: an instance of the class it is nested in."""
        return type(self).owner(self)

    def but(self, **changes: Any) -> Self:
        """A copy with dotted changes: `spec.but(**{"vision.body.depth": 4})`; steps into tuples by index.

        Unknown names and values of the wrong type raise UserError; a typo names the nearest field.
        """
        out = self
        for path, value in changes.items():
            out = _set(out, path.split("."), value, path)
        return out

    def lines(self, prefix: str = "") -> Iterator[str]:
        """One `path = value` line per leaf: the golden text that reviews and tests diff."""
        yield f"{prefix or '.'} : {type(self).__qualname__}"
        for f in fields(self):
            value: Any = getattr(self, f.name)
            path = f"{prefix}.{f.name}" if prefix else f.name
            if isinstance(value, Spec):
                yield from value.lines(path)
            elif _specs(value):
                for i, v in enumerate(cast(tuple[Spec, ...], value)):
                    yield from v.lines(f"{path}.{i}")
            else:
                yield f"{path} = {value.__qualname__ if callable(value) else repr(value)}"

    def digest(self) -> str:
        """Twelve hex digits of the golden lines: the name of this value in caches."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form that `from_dict` reads back exactly."""
        return {"is": _name(type(self)), **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


def from_dict(plain: Any) -> Any:
    """Inverse of `Spec.to_dict`. Names are looked up inside polysense only, so a file cannot call anything else.

    Fields that the file lacks take their defaults (older files stay readable); unknown ones are refused.
    """
    if isinstance(plain, list):
        return tuple(from_dict(v) for v in cast(list[Any], plain))
    if not isinstance(plain, dict):
        return plain
    table = cast(dict[str, Any], plain)
    if "function" in table:
        return _find(table["function"])
    cls = _find(str(table.get("is")))
    if not (isinstance(cls, type) and issubclass(cls, Spec)):
        raise UserError(f"{table.get('is')!r} is not a configuration", "was the file edited?")
    names = {f.name for f in fields(cls)}
    if extra := set(table) - names - {"is"}:
        raise UserError(f"{table['is']} has no field {sorted(extra)}", "the file was written by another version of polysense")
    return cls(**{k: from_dict(v) for k, v in table.items() if k != "is"})


def parse_value(text: str) -> Any:
    """A value typed on a command line: a Python literal where it is one, else the string itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def parse_overrides(words: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`["vision.body.depth=4"]` -> `{"vision.body.depth": 4}`."""
    out: dict[str, Any] = {}
    for word in words:
        path, eq, value = word.partition("=")
        if not eq or not path:
            raise UserError(f"cannot read {word!r}", "an override looks like vision.body.depth=4")
        out[path] = parse_value(value)
    return out


class Configured:
    """Mixin: ties a nested `Config` to the class that it builds."""

    def __init_subclass__(cls, **kw: Any):
        super().__init_subclass__(**kw)
        if "Config" in cls.__dict__:
            cls.__dict__["Config"].owner = cls


def _specs(value: Any) -> bool:
    return isinstance(value, tuple) and bool(cast(tuple[Any, ...], value)) and isinstance(value[0], Spec)


def _set(out: Any, path: list[str], value: Any, whole: str) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(out, tuple):
        out = cast(tuple[Any, ...], out)
        if not head.lstrip("-").isdigit() or not -len(out) <= int(head) < len(out):
            raise UserError(f"no {head!r} in {whole!r}", f"it is a list of {len(out)}: use a number from 0 to {len(out) - 1}")
        i = int(head) % len(out)
        return (*out[:i], _set(out[i], rest, value, whole) if rest else value, *out[i + 1:])
    if not isinstance(out, Spec):
        raise UserError(f"cannot go into {head!r} of {whole!r}", f"{out!r} is a single value")
    names = [f.name for f in fields(out)]
    if head not in names:
        close = get_close_matches(head, names, 3, 0.5) or names
        raise UserError(f"{type(out).__qualname__} has no field {head!r} (in {whole!r})", f"did you mean {' or '.join(close)}?")
    if rest:
        return replace(out, **{head: _set(getattr(out, head), rest, value, whole)})
    return replace(out, **{head: _checked(value, get_type_hints(type(out))[head], whole)})


def _checked(value: Any, hint: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not _fits(value, hint):
        given = f"a {type(value).__qualname__}" if isinstance(value, Spec) else repr(value)      # a whole tower would fill the screen
        raise UserError(f"{path}={given} has the wrong type", f"expected {getattr(hint, '__qualname__', None) or hint}")
    return tuple(cast(list[Any], value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any or origin is Callable or get_origin(hint) is type:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if origin is not None:
        return isinstance(value, (tuple, list)) if origin is tuple else isinstance(value, origin) or callable(value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    return not isinstance(hint, type) or isinstance(value, hint)


def _name(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in cast(tuple[Any, ...], value)]
    return {"function": _name(value)} if callable(value) else value


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    if module.split(".")[0] != "polysense":
        raise UserError(f"{name!r} is not part of polysense", "only polysense's own classes may stand in a preset file")
    out: Any = import_module(module)
    for step in path.split("."):
        out = getattr(out, step)
    return out
