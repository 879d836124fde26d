"""How a part completes the configuration of the parts in its slots."""
from dataclasses import fields, replace
from typing import Any

from polysense.base.spec import Spec


def filled(spec: Spec, **given: Any) -> Spec:
    """The same value with its unset fields (0 or None) set to what the owner knows, such as `width`; fields it lacks are ignored."""
    names = {f.name for f in fields(spec)}
    return replace(spec, **{k: v for k, v in given.items() if k in names and getattr(spec, k) in (0, None)})


def build(spec: Spec, **given: Any) -> Any:
    """`filled(spec, **given).build()`: a slot may leave to its owner what the owner says anyway."""
    return filled(spec, **given).build()
