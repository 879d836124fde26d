"""LoRA: h = W0 x + (alpha / r) B A x on any dense, convolutional or embedding layer (Hu et al. 2022, equation 3).

    Config(rank=8, on="*.q|v").put(system)      merge(system), unmerge(system)      switch(system, ("one", "other"))      bare(system)

A layer stays what it is, with its names and its frozen weight; its class becomes one that adds the updates of its active adapters, which lie
under `lora.NAME.A` and `lora.NAME.B`. Shapes: k into, d out, r rank.
"""
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.mechanisms.adapter import AdapterConfig, Rename, beside, chosen, copied, own_weights, patterns

CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
KINDS = (nn.Linear, nn.Embedding, *CONVOLVE)
INITS, SCALINGS = ("kaiming", "gaussian"), ("rank", "root")
PEFT = "base_model.model."
FOREIGN = re.compile(r"(?P<layer>.+?)[._]lora(?:_embedding)?[._](?P<kind>A|B|down|up)(?:\.default)?(?:\.weight)?")


@dataclass(frozen=True, kw_only=True)
class LowRank(AdapterConfig):
    """Where the updates stand and how large they are. `also` names parameters that train beside them in full, such as "head.*"."""
    rank: int = 8
    alpha: float | None = None               # None: the rank, which makes the scale 1
    on: str = "*.q|v"                        # names of layers; see `adapter.patterns`
    dropout: float = 0.0                     # of the adapter's input alone
    init: str = "kaiming"                    # of A: kaiming-uniform with a = sqrt(5), as released, or "gaussian" of std 1 / r, as in the paper
    scaling: str = "rank"                    # alpha / r, or "root": alpha / sqrt(r) (Kalajdzievski 2023, rsLoRA)
    parts: int = 1                           # a fused layer (qkv) is so many layers on top of each other ...
    enabled: tuple[int, ...] = (0,)          # ... and these of them get an update each
    name: str = "default"
    also: str = ""

    def put(self, system: nn.Module) -> None:
        if self.rank < 1 or self.init not in INITS or self.scaling not in SCALINGS or not set(self.enabled) <= set(range(self.parts)):
            raise UserError(f"rank={self.rank}, init={self.init!r}, scaling={self.scaling!r}, enabled={self.enabled} of {self.parts}",
                            f"the rank is at least 1, init one of {', '.join(INITS)}, scaling of {', '.join(SCALINGS)}, enabled below parts")
        if "." in self.name or not self.name:
            raise UserError(f"an adapter cannot be called {self.name!r}", "give it a name without dots")
        for path, layer in chosen(system, self.on, lambda m: isinstance(m, KINDS), "dense, convolutional or embedding layer"):
            grow(layer, self, path)

    def trainable(self, system: nn.Module) -> tuple[str, ...]:
        return (f"*.lora.{self.name}.*", *patterns(self.also))

    def about(self, system: nn.Module, name: Rename = str) -> dict[str, Any]:
        """LoraConfig of peft. UserError for what it cannot express."""
        if self.parts != 1:
            raise UserError("peft has no updates for the parts of a fused layer", "keep the run folder")
        return {"peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": "", "r": self.rank,
                "lora_alpha": self.rank if self.alpha is None else self.alpha, "lora_dropout": self.dropout, "use_rslora": self.scaling == "root",
                "bias": "none", "fan_in_fan_out": False, "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
                "target_modules": [name(n) for n, layer in adapted_layers(system) if self.name in layer.lora],
                "modules_to_save": sorted({name(n.rpartition(".")[0]) for n in beside(system, self.also)}) or None}

    def tensors(self, system: nn.Module, name: Rename = str) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for path, layer in adapted_layers(system):
            if self.name in layer.lora:
                one = layer.lora[self.name]
                for k in "AB":
                    value = getattr(one, k).detach()
                    if k == "B" and isinstance(layer, tuple(CONVOLVE)):
                        value = value.view(*value.shape, *(1,) * (layer.weight.ndim - 2))
                    out[f"{PEFT}{name(path)}.{f'lora_embedding_{k}' if one.embeds else f'lora_{k}.weight'}"] = value
        return out | {f"{PEFT}{name(n.rpartition('.')[0])}.{n.rpartition('.')[2]}": p.detach() for n, p in beside(system, self.also).items()}

    def load(self, system: nn.Module, tensors: dict[str, Tensor], name: Rename = str) -> None:
        """Of peft, loralib (`lora_A`) and kohya or diffusers (`lora_down`, `lora_up`, with `alpha`) files; see `plain_names`."""
        found, also = plain_names(tensors), beside(system, self.also)
        for path, layer in adapted_layers(system):
            if self.name not in layer.lora:
                continue
            theirs, one = found.pop(name(path), {}), layer.lora[self.name]
            if theirs.keys() < {"A", "B"}:
                raise UserError(f"the file has no update of {name(path)}", "was it made for another system, or for other layers?")
            copied(one.A, theirs["A"].reshape(one.A.shape) if theirs["A"].numel() == one.A.numel() else theirs["A"], f"{path}.A")
            copied(one.B, theirs["B"].flatten(1), f"{path}.B")
            if "alpha" in theirs:                        # these files carry their own
                one.scale = float(theirs["alpha"]) / one.rank
        for full, p in also.items():
            module, _, leaf = full.rpartition(".")
            copied(p, found.pop(name(module), {}).get(leaf, p), full)
        if left := sorted(n for n, t in found.items() if t.keys() & {"A", "B"}):
            raise UserError(f"the file has an update of {left[0]}, which has no adapter here", "name its layers with on=")

    def settle(self, system: nn.Module) -> None:
        merge(system)
        bare(system)


def plain_names(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{layer: {"A", "B" and where given "alpha"}} of the names of any library; whatever is none of these is kept as {module: {leaf: tensor}}.

    peft `base_model.model.L.lora_A.weight` (or `.lora_A.default.weight`, `.lora_embedding_A`), loralib `L.lora_A`, diffusers `L.lora.down.weight`
    and `L.lora_A.weight`, kohya `L.lora_down.weight` with `L.alpha`.
    """
    out: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        key = key.removeprefix(PEFT)
        if m := FOREIGN.fullmatch(key):
            out.setdefault(m["layer"], {})[{"down": "A", "up": "B"}.get(m["kind"], m["kind"])] = value
        else:
            module, _, leaf = key.rpartition(".")
            out.setdefault(module.removesuffix(".modules_to_save.default"), {})[leaf] = value
    return out


class Update(nn.Module):
    """One adapter of one layer. A [E r, k...], B [E d / parts, r] for the E enabled of its parts; an embedding's A is zero, else B is."""

    def __init__(self, layer: nn.Module, c: LowRank, path: str = ""):
        super().__init__()
        weight: Any = layer.weight
        self.parts, self.enabled, self.rank, self.dropout = c.parts, tuple(sorted(c.enabled)), c.rank, c.dropout
        self.scale = (c.rank if c.alpha is None else c.alpha) / (sqrt(c.rank) if c.scaling == "root" else c.rank)
        if getattr(layer, "groups", 1) != 1 or weight.shape[0] % c.parts or (c.parts > 1 and not isinstance(layer, nn.Linear)):
            raise UserError(f"{path or 'a layer'} cannot have an update of {c.parts} parts",
                            "grouped convolutions have none, and parts divide a dense layer")
        e, (d, *k) = len(self.enabled), weight.shape
        like = {"device": weight.device, "dtype": weight.dtype if weight.is_floating_point() else torch.float32}
        self.embeds = isinstance(layer, nn.Embedding)
        if self.embeds:
            d, k = weight.shape[1], [weight.shape[0]]
        self.A = nn.Parameter(torch.zeros(e * c.rank, *k, **like))
        self.B = nn.Parameter(torch.zeros(e * d // c.parts, c.rank, **like))
        if self.embeds:
            nn.init.normal_(self.B)
        elif c.init == "gaussian":
            nn.init.normal_(self.A, std=1 / c.rank)
        else:
            for a in self.A.chunk(e):                    # each update by its own fan, as if it stood alone
                nn.init.kaiming_uniform_(a, a=sqrt(5))

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """What is added to the layer's output for the input x."""
        if self.embeds:
            return F.embedding(x, self.A.T, layer.padding_idx) @ self.B.T * self.scale
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if isinstance(layer, nn.Linear):
            low = F.linear(x.to(self.A.dtype), self.A)
            if self.parts == 1:
                return F.linear(low, self.B) * self.scale
            ups = [F.linear(z, b) for z, b in zip(low.split(self.rank, -1), self.B.chunk(len(self.enabled)))]
            return torch.cat(self._spread(ups), -1) * self.scale
        convolve = next(f for kind, f in CONVOLVE.items() if isinstance(layer, kind))
        low = convolve(x, self.A, None, layer.stride, layer.padding, layer.dilation)
        return torch.einsum("dr,br...->bd...", self.B, low) * self.scale

    def delta(self) -> Tensor:
        """(alpha / r) B A in the shape of the layer's weight."""
        if self.embeds:
            return (self.B @ self.A).T * self.scale
        pairs = zip(self.B.chunk(len(self.enabled)), self.A.flatten(1).split(self.rank))
        whole = torch.cat(self._spread([(b @ a).T for b, a in pairs]), -1).T
        return whole.reshape(len(whole), *self.A.shape[1:]) * self.scale

    def _spread(self, pieces: list[Tensor]) -> list[Tensor]:
        """[..., d / parts] of each enabled part, zeros for the others."""
        found = dict(zip(self.enabled, pieces))
        return [found.get(i, torch.zeros_like(pieces[0])) for i in range(self.parts)]


class _Adapted:
    """Mixed into a layer's class. `lora`: its updates by name; `active`: which count; `merged`: which are inside the weight now."""
    lora: Any
    active: tuple[str, ...]
    merged: tuple[str, ...]

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)  # type: ignore[misc]
        for name in (n for n in self.active if n not in self.merged):
            out = out + self.lora[name](self, x).to(out.dtype)
        return out

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a Start: its weights are the base's, the updates stay."""
        below: Any = getattr(super(), "take_over", None)
        weights = weights if below is None else below(weights)
        return own_weights(self, weights, lambda k: k.startswith("lora."))  # type: ignore[arg-type]


def grow(layer: nn.Module, c: LowRank, path: str = "") -> None:
    """Puts an update onto a layer, beside those that it has. UserError for a name that is taken."""
    if not isinstance(layer, _Adapted):
        kind = type(layer)
        layer.__class__ = type(f"LowRank{kind.__name__}", (_Adapted, kind), {})
        layer.lora, layer.active, layer.merged = nn.ModuleDict(), (), ()
    if c.name in layer.lora:
        raise UserError(f"{path or 'a layer'} has an adapter {c.name!r} already", "give this one another name")
    layer.lora[c.name] = Update(layer, c, path)
    layer.active = (*layer.active, c.name)
    for p in (p for n, p in layer.named_parameters(recurse=False)):
        p.requires_grad_(False)


def adapted_layers(system: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with an update."""
    return ((n, m) for n, m in system.named_modules() if isinstance(m, _Adapted))


def switch(system: nn.Module, names: Iterable[str]) -> None:
    """Only these adapters count, and their sum; () switches all off. UserError for a name that no layer has, and while some are merged."""
    names = tuple(names)
    found = {n for _, layer in adapted_layers(system) for n in layer.lora}
    if lost := [n for n in names if n not in found]:
        raise UserError(f"no adapter {lost[0]!r}", f"there are {', '.join(sorted(found)) or 'none'}")
    for path, layer in adapted_layers(system):
        if layer.merged:
            raise UserError(f"the adapters of {path} are merged", "unmerge first")
        layer.active = tuple(n for n in names if n in layer.lora)


@torch.no_grad()
def merge(system: nn.Module) -> None:
    """W <- W0 + (alpha / r) B A for the active adapters: the same outputs at the cost of the base. UserError for quantised weights."""
    for path, layer in adapted_layers(system):
        if "weight" not in layer._parameters:
            raise UserError(f"{path} is quantised, so nothing can be merged into it", "dequantise it first (mechanisms.nf4.restore)")
        for name in (n for n in layer.active if n not in layer.merged):
            layer.weight += layer.lora[name].delta().to(layer.weight.dtype)
        layer.merged = layer.active


@torch.no_grad()
def unmerge(system: nn.Module) -> None:
    """W0 again, within rounding."""
    for _, layer in adapted_layers(system):
        for name in layer.merged:
            layer.weight -= layer.lora[name].delta().to(layer.weight.dtype)
        layer.merged = ()


def bare(system: nn.Module) -> None:
    """Takes all updates off; what was merged stays inside the weights."""
    for _, layer in list(adapted_layers(system)):
        layer.__class__ = next(k for k in type(layer).__mro__ if not issubclass(k, _Adapted))
        del layer.lora, layer.active, layer.merged
