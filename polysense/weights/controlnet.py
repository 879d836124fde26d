"""ControlNet as it is published: in diffusers' folders, in the original file with its base, and as a copy alone, to be put on any base."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import latent_diffusion, unet_compvis, unet_diffusers
from polysense.weights.keymap import KeyMap, Rule, State, both
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, size, within
from polysense.weights.unet_sizes import PLAIN

BASE = (r"(unet|vae|text)\..*", r"log_noise", r"controls\.[1-9].*")


def copy_diffusers(config: Any) -> KeyMap:
    """`controls.0` as a ControlNetModel; the base is kept as it is."""
    n = len(config.unet.skips)
    rules = [*both("controlnet_cond_embedding.conv_in", "listen.conv_in"), *both("controlnet_cond_embedding.blocks.{i}", "listen.blocks.{i}"),
             *both("controlnet_cond_embedding.conv_out", "listen.conv_out"), *both("controlnet_mid_block", f"whisper.{n}"),
             *(r for i in range(n) for r in both(f"controlnet_down_blocks.{i}", f"whisper.{i}"))]
    return (unet_diffusers.half(config.unet).at("", "copy") + KeyMap(tuple(rules))).at("", "controls.0") + KeyMap((), own=BASE)


def copy_original(config: Any) -> KeyMap:
    """`controls.0` as `control_model.*`; the base is kept as it is."""
    n, convs = len(config.unet.skips), 2 * (len(config.hint_widths) - 1)
    rules: list[Rule] = [*both("input_hint_block.0", "listen.conv_in"), *both(f"input_hint_block.{2 * convs + 2}", "listen.conv_out"),
                         *both("middle_block_out.0", f"whisper.{n}")]
    for i in range(convs):
        rules += both(f"input_hint_block.{2 * i + 2}", f"listen.blocks.{i}")
    for i in range(n):
        rules += both(f"zero_convs.{i}.0", f"whisper.{i}")
    return (unet_compvis.half(config.unet).at("", "copy") + KeyMap(tuple(rules))).at("control_model", "controls.0") + KeyMap((), own=BASE)


def _one(config: Any) -> None:
    if config.kinds != 1:
        raise UserError(f"this ControlNet has {config.kinds} kinds of map, a file holds one", "keep the run folder")


def diffusers_map(config: Any) -> KeyMap:
    _one(config)
    copy = copy_diffusers(config)
    return latent_diffusion.diffusers_map(config) + KeyMap(copy.rules, alias=copy.alias).at("controlnet")


def original_map(config: Any) -> KeyMap:
    _one(config)
    return latent_diffusion.original_map(config) + KeyMap(copy_original(config).rules)


def read_diffusers(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) of a StableDiffusionControlNetPipeline's folder."""
    own = within(config, "controlnet")
    if own.get("_class_name") != "ControlNetModel" or own.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise UserError("the folder controlnet holds no ControlNetModel of RGB maps", "give the folder of a StableDiffusionControlNetPipeline")
    if own.get("global_pool_conditions") or any(own.get(k, v) not in (v, False if v is None else v) for k, v in PLAIN.items()):
        raise UserError("this ControlNetModel is of a later kind", "the one of Stable Diffusion 1 is read")
    name, overrides = latent_diffusion.read_diffusers(config, state)
    return name, overrides | {"config.hint_widths": tuple(own.get("conditioning_embedding_out_channels", (16, 32, 96, 256)))}


def write_diffusers(config: Any) -> Dict:
    _one(config)
    out = latent_diffusion.write_diffusers(config)
    unet = {k: v for k, v in out["unet"].items() if k not in ("_class_name", "sample_size", "out_channels", "up_block_types", "dropout")}
    return out | {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": {
        "_class_name": "ControlNetModel", **unet, "conditioning_embedding_out_channels": list(config.hint_widths), "conditioning_channels": 3,
        "controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}}


def read_original(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) of a file with `control_model.*` and its base."""
    if "control_model.input_hint_block.0.weight" not in state:
        raise UserError("the file has no control_model", "give a ControlNet with its base, such as control_sd15_canny.pth")
    last = max(int(k.split(".")[2]) for k in state if k.startswith("control_model.input_hint_block."))
    widths = [size(state, f"control_model.input_hint_block.{i}.weight") for i in range(0, last - 1, 4)]
    if "model.diffusion_model.input_blocks.0.0.weight" not in state:
        raise UserError("the file holds the copy alone, without the model it stands on", "give a file with its base, or load it by its key map")
    name, overrides = latent_diffusion.read_original(config, state)
    return name, overrides | {"config.hint_widths": tuple(widths)}


DIFFUSERS = Layout(of="controlnet", name="diffusers", keymap=diffusers_map, read=read_diffusers, write=write_diffusers,
                   config_file="model_index.json",
                   folders=(*latent_diffusion.DIFFUSERS.folders, ("controlnet", "config.json", "diffusion_pytorch_model.safetensors")))
ORIGINAL = Layout(of="controlnet", name="original", keymap=original_map, read=read_original, write=lambda config: {}, config_file="")
