"""Perceptual distances as they are published: `lpips.LPIPS`'s whole state, or its few linears beside torchvision's VGG in a file of its own."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polysense.base.errors import UserError
from polysense.weights.convnet_torchvision import convolutions
from polysense.weights.files import read_state
from polysense.weights.keymap import KeyMap, Op, Rule, State, both, load_into, rename, rule

pointwise = Op("pointwise", lambda t: [t[0].reshape(-1)], lambda t: [t[0].view(1, -1, 1, 1)])         # [1,C,1,1] -> [C]


def placed(config: Any) -> Iterator[tuple[int, int, str]]:
    """(slice, number in torchvision's `features`, our name) of each convolution; slice s ends with the s-th map."""
    for i, (n, name) in enumerate(convolutions(config)):
        yield sum(i > last for last in config.seen) + 1, n, name


def keymap(config: Any) -> KeyMap:
    """For a Perceptual.Config: the state of `lpips.LPIPS(net="vgg")`."""
    rules: list[Rule] = [rule(f"lin{i}.model.1.weight", f"weigh.{i}", pointwise) for i in range(len(config.seen))]
    for of, n, ours in placed(config):
        rules += both(f"net.slice{of}.{n}", f"tower.{ours}")
    return KeyMap(tuple(rules), drop=(r"scaling_layer\..*", r"lins\..*"))


def load_perceptual(part: nn.Module, config: Any, *paths: str | Path) -> None:
    """Puts files into a Perceptual, in place: the whole state, or linears and torchvision's `vgg16` in any order (files of `features.*`).

    Raises UserError where together they do not hold everything.
    """
    state: State = State()
    for path in paths:
        state |= read_state(Path(path))
    numbers = {str(n): of for of, n, _ in placed(config)}
    named = State()
    for key, value in state.items():
        _, _, n = rename(key, "features.{n}.{rest}", "@.@.{n}").rpartition(".")
        if key.startswith("features.") and n in numbers:
            key = rename(key, "features.{n}.{rest}", f"net.slice{numbers[n]}.{{n}}.{{rest}}")
        if not key.startswith(("classifier.", "features.")):
            named[key] = value
    if not any(k.startswith("lin") for k in named):
        raise UserError(f"{', '.join(Path(p).name for p in paths)} holds no linears of LPIPS", "give lpips' own vgg.pth beside the network")
    if not any(k.startswith("net.") for k in named):
        raise UserError(f"{', '.join(Path(p).name for p in paths)} holds LPIPS' linears without a network", "give torchvision's vgg16 beside it")
    load_into(part, keymap(config), named)


def write_perceptual(part: nn.Module, config: Any) -> dict[str, Tensor]:
    """The state of a Perceptual under the names of `lpips.LPIPS`."""
    return keymap(config).save(part.state_dict())
