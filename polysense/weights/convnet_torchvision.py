"""VGG and AlexNet as torchvision publishes them: a bare file of weights, `features.{n}` numbered with ReLU and pools counted, `classifier.{n}`."""
import re
from collections.abc import Iterator
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, Rule, State, both
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, image_feed, size

ROW, POOL = "polysense.towers.convnet:Row.Config", "polysense.towers.convnet:Pool.Config"
DENSE = {"vgg": (0, 3, 6), "alexnet": (1, 4, 6)}                       # the places of the linear layers in `classifier`
FORM = {"vgg": (2, 2), "alexnet": (3, 2)}                              # side and stride of the pools


def convolutions(c: Any) -> Iterator[tuple[int, str]]:
    """(number in `features`, our name) of each convolution of a `ConvNet.Config`: ReLU and pools are counted too."""
    n, stage, at = 0, 0, 0
    for row in c.rows:
        yield n, f"stages.{stage}.{at}.conv"
        n, at = n + 2, at + 1
        if row.pool is not None:
            n, stage, at = n + 1, stage + 1, 0


def vision(c: Any) -> tuple[Rule, ...]:
    """The rules of the convolutions, for any layout that numbers them so."""
    return tuple(r for n, name in convolutions(c) for r in both(f"features.{n}", f"backbone.{name}"))


def rows(state: State, of: str) -> list[Any]:
    """The rows that the shapes of `features.*` say: a gap of three between numbers holds a pool. Raises UserError for the forms with batch norm."""
    found = sorted(int(m[1]) for k in state if (m := re.fullmatch(r"features\.(\d+)\.weight", k)))
    if any(state[f"features.{n}.weight"].ndim != 4 for n in found) or not found:
        raise UserError(f"this file's features are not those of a plain {of}", "forms with batch norm (vgg16_bn) are not read")
    out: list[Any] = []
    for n, after in zip(found, [*found[1:], found[-1] + 3]):
        width, _, kernel, _ = state[f"features.{n}.weight"].shape
        plan: Dict = {"is": ROW, "out": width, "kernel": kernel}
        plan |= {"stride": 4, "padding": 2} if of == "alexnet" and n == 0 else {}
        side, stride = FORM[of]
        out.append(from_dict(plan | ({"pool": {"is": POOL, "side": side, "stride": stride}} if after - n > 2 else {})))
    return out


def _layout(of: str, preset: str) -> Layout:
    numbers = DENSE[of]

    def keymap(config: Any) -> KeyMap:
        if len(config.backbone.hidden) != 2:
            raise UserError(f"torchvision's {of} has two hidden dense layers", "keep the run folder")
        dense = ((f"classifier.{n}", name) for n, name in zip(numbers, ("backbone.hidden.0", "backbone.hidden.1", "head")))
        return KeyMap((*vision(config.backbone), *(r for theirs, ours in dense for r in both(theirs, ours))))

    def read(config: Dict, state: State) -> tuple[str, Dict]:
        found = rows(state, of)
        first, second, last = (f"classifier.{n}.weight" for n in numbers)
        grid = round((size(state, first, 1) / found[-1].out) ** 0.5)
        one, two = size(state, first), size(state, second)
        return preset, {"config.backbone.rows": tuple(found), "config.backbone.grid": grid,
                        "config.backbone.hidden": (one, two), "config.backbone.channels": size(state, "features.0.weight", 1),
                        "config.head.into": two, "config.head.out": size(state, last), **image_feed(224, resample="bilinear")}

    def write(config: Any) -> Dict:
        refuse(config, of)
        return {}

    return Layout(of=of, name="torchvision", keymap=keymap, read=read, write=write, config_file="", weights_file="model.safetensors")


def refuse(config: Any, of: str) -> None:
    """Raises UserError for a network that is not the published form: groups, norms, other strides."""
    c = config.backbone
    side, stride = FORM[of]
    for i, row in enumerate(c.rows):
        first = of == "alexnet" and i == 0
        if row.norm is not None or row.groups != 1 or row.act != "relu" or row.stride != (4 if first else 1) \
                or row.padding not in ((2,) if first else (None, row.kernel // 2)) \
                or (row.pool is not None and (row.pool.kind, row.pool.side, row.pool.stride) != ("max", side, stride)):
            raise UserError(f"the published {of} has no place for row {i} of this network (norm, groups, stride, activation or pool)",
                            "keep the run folder" if of == "vgg" else "export the preset `torchvision`")
    if c.front is not None or c.act != "relu" or not hasattr(config.head, "out"):
        raise UserError(f"the published {of} reads pictures as they are, has ReLU and a dense head", "keep the run folder")


VGG, ALEXNET = _layout("vgg", "paper"), _layout("alexnet", "torchvision")
