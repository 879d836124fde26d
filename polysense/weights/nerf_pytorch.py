"""NeRF as nerf-pytorch saves it: one file with the states of both networks, and an optimiser's, which is left out. No configuration: sizes are
told by shapes, near and far are the scene's and not in the file."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, both
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, size

NETWORKS = {"network_fn_state_dict": "coarse", "network_fine_state_dict": "fine"}


def network(theirs: str, ours: str) -> tuple[Any, ...]:
    return (*both(f"{theirs}.pts_linears.{{i}}", f"{ours}.layers.{{i}}"), *both(f"{theirs}.views_linears.0", f"{ours}.late"),
            *both(f"{theirs}.feature_linear", f"{ours}.feature"), *both(f"{theirs}.alpha_linear", f"{ours}.density"),
            *both(f"{theirs}.rgb_linear", f"{ours}.colour"))


def keymap(config: Any) -> KeyMap:
    check(config)
    return KeyMap(tuple(r for theirs, ours in NETWORKS.items() for r in network(theirs, ours)))


def check(config: Any) -> None:
    """Raises UserError for a NeRF that their code cannot build."""
    for net in (config.coarse, config.fine):
        if net is None or net.view != "late" or net.place.unit != "one" or net.place.first != "place" or net.direction.unit != "one" \
                or net.direction.first != "place":
            raise UserError("nerf-pytorch has two networks, late directions, and the place itself before its waves, without pi",
                            "keep the run folder, or train a system of the released form")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    out: Dict = {}
    for theirs, ours in NETWORKS.items():
        width, depth = size(state, f"{theirs}.pts_linears.0.weight"), count(state, f"{theirs}.pts_linears")
        place, view = size(state, f"{theirs}.pts_linears.0.weight", 1), size(state, f"{theirs}.views_linears.0.weight", 1) - width
        again = [i for i in range(1, depth) if size(state, f"{theirs}.pts_linears.{i}.weight", 1) != width]
        if len(again) > 1 or (place - 3) % 6 or (view - 3) % 6:
            raise UserError(f"{theirs} is not of the released form (inputs {place} and {view}, places read again by {again})",
                            "only 3 + 6 L inputs and one skip are read")
        out |= {f"config.{ours}.width": width, f"config.{ours}.depth": depth, f"config.{ours}.skip": again[0] if again else 0,
                f"config.{ours}.place.levels": (place - 3) // 6, f"config.{ours}.direction.levels": (view - 3) // 6}
    return "paper", out


def write(config: Any) -> Dict:
    check(config)
    return {}


LAYOUT = Layout(of="nerf", name="nerf_pytorch", keymap=keymap, read=read, write=write, config_file="", weights_file="nerf.safetensors")
