"""What the names of parameters say of them: how deep they lie in their tower, and which of them never decay."""
import re
from collections.abc import Iterable
from typing import cast

from torch import nn

LAYER = re.compile(r"^(?P<tower>(?:.*?\.)??)(?P<within>body\.)?(?:blocks|stages)\.(?P<at>\d+)\.")
NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
AFTER_THE_LAYERS = ("norm.", "pool.", "head.")


def undecayed(system: nn.Module) -> set[str]:
    """Names of the parameters that never decay: biases, those of norms, of fewer than two dimensions, and what a module lists as `undecayed`."""
    out = {n for n, p in system.named_parameters() if p.ndim < 2 or n.rpartition(".")[2].startswith("bias")}
    for name, module in cast("Iterable[tuple[str, nn.Module]]", system.named_modules()):
        if isinstance(module, NORMS) or "norm" in type(module).__name__.lower():
            out |= {f"{name}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)}
        out |= {f"{name}.{n}".lstrip(".") for n in getattr(module, "undecayed", ())}
    return out


def layers(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """name -> (l, L): the layer of a parameter and the highest layer of its tower.

    Read from the names: `blocks.{i}` and `stages.{s}` are layers i+1, what stands before them in the same tower (patch embedding,
    positions, stem) is layer 0; final norm, pooling and everything outside a tower (heads, temperatures) is layer L = L, the highest.
    """
    names = list(names)
    found = [m for m in map(LAYER.match, names) if m]
    depth: dict[str, int] = {}
    for m in found:
        depth[m["tower"]] = max(depth.get(m["tower"], 0), int(m["at"]) + 1)
    out: dict[str, tuple[int, int]] = {}
    for name in names:
        m = LAYER.match(name)
        tower = m["tower"] if m else max((t for t in depth if name.startswith(t)), key=len, default=None)
        if tower is None:
            out[name] = (0, 0)
            continue
        top, rest = depth[tower] + 1, name.removeprefix(tower).removeprefix("body.")
        out[name] = (int(m["at"]) + 1 if m else top if rest.startswith(AFTER_THE_LAYERS) else 0, top)
    return out
