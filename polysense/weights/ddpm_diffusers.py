"""DDPM as diffusers publishes it: a UNet2DModel with `scheduler_config.json` beside it."""
from typing import Any

from polysense.weights.keymap import KeyMap, State
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, image_feed, within
from polysense.weights.unet_diffusers import keymap as unet_keymap
from polysense.weights.unet_sizes import PIXEL, read_schedule, read_unet, square, write_schedule, write_unet


def keymap(config: Any) -> KeyMap:
    return unet_keymap(config.unet).at("", "unet")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) of `config.json` of a UNet2DModel; the schedule of the preset where none lies beside it."""
    unet, size = read_unet(config, PIXEL), square(config)
    return "paper", {"config.unet": unet, "config.size": size, **image_feed(size), **read_schedule(within(config, "scheduler_config"))}


def write(config: Any) -> Dict:
    return write_unet(config.unet, config.size) | {"scheduler_config": write_schedule(config)}


LAYOUT = Layout(of="ddpm", name="diffusers", keymap=keymap, read=read, write=write, weights_file="diffusion_pytorch_model.safetensors",
                beside=("scheduler_config.json",))
