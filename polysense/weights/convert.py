"""A published checkpoint into a system and back, and how far two results may differ."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import State, load_into
from polysense.weights.layout import Layout, read_checkpoint, write_checkpoint

CAUSES = ("the activation (QuickGELU or GELU: about 1e-2)", "the norm's epsilon (about 1e-5)", "the position where the text is pooled (order 1)",
          "the resize kernel, if pictures were read (about 1e-2)")


def import_(path: str | Path, layout: Layout, preset_of: Callable[[str], Any]) -> tuple[Any, Any]:
    """(system in eval mode, preset) of a published checkpoint: a folder, a file or a hub id.

    `preset_of(name)` gives the system's preset of that name; its sizes become the file's. Raises UserError for whatever does not fit.
    """
    config, state = read_checkpoint(path, layout)
    name, overrides = layout.read(config, state)
    preset = preset_of(name).but(**overrides)
    system = preset.config.build()
    load_into(system, layout.keymap(preset.config), state)
    return system.eval(), preset


def export(system_state: State, config: Any, layout: Layout, path: str | Path, feed: Feed | None = None) -> Path:
    """Writes our weights as a published checkpoint; `config` is the system's, `feed` adds how pictures are read.

    Raises UserError, before anything is written, for a system that the layout cannot hold.
    """
    theirs = layout.write(config)
    if feed is not None:
        for key, value in layout.feed(feed).items():
            theirs[key] = {**theirs.get(key, {}), **value} if isinstance(value, dict) else value
    return write_checkpoint(path, theirs, layout.keymap(config).save(system_state), layout)


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> float:
    """Largest absolute difference between outputs of the same names and shapes, divided by the largest value where that is above one.

    Raises UserError beyond `tolerance`, naming the worst output and the usual causes.
    """
    if set(ours) != set(theirs) or not ours:
        raise UserError(f"there are outputs {sorted(ours)} and {sorted(theirs)}", "compare outputs of the same names")
    worst, where = 0.0, ""
    for name, a in ours.items():
        b = theirs[name]
        if a.shape != b.shape:
            raise UserError(f"{name} has shape {list(a.shape)} here and {list(b.shape)} there", "the sizes differ: check the configuration")
        apart = gap({name: a}, {name: b})
        if apart >= worst:
            worst, where = apart, name
    if worst > tolerance:
        raise UserError(f"{where} differs by {worst:.2g}, more than {tolerance:.0e}", "usual causes: " + "; ".join(CAUSES))
    return worst


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest absolute difference over outputs of equal shapes, divided by the largest value where that is above one; NaN counts as infinite."""
    apart = (float(torch.nan_to_num((a.double() - theirs[k].double()).abs().max() / theirs[k].double().abs().max().clamp_min(1.0), nan=torch.inf))
             for k, a in ours.items())
    return max(apart, default=0.0)
