"""DINOv2's towers as their authors publish them (`dinov2_vits14_pretrain.pth`, `dinov2_vits14_reg4_pretrain.pth`): a bare state in timm's names, with
the mask token, layer scale, and in the largest the gated MLP as one `w12`. There is no configuration: heads are 64 numbers wide.

Positions of the first weights are interpolated plainly to a grid a tenth of a patch larger than asked for, those with registers antialiased.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.dinov2_hf import gated, owned, registered, sized, swiglu
from polysense.weights.keymap import KeyMap, State, both, lead1, rule, stack
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, Dict, body, count, side, size
from polysense.weights.vit_timm import VISION

HEAD_WIDTH = 64

GATED = (*(rule(f"blocks.{{i}}.mlp.w12.{p}", (f"body.blocks.{{i}}.mlp.gate.{p}", f"body.blocks.{{i}}.mlp.up.{p}"), stack(2))
           for p in ("weight", "bias")), *both("blocks.{i}.mlp.w3", "body.blocks.{i}.mlp.down"))
CHUNKED = (("blocks.{c}.{i}.{rest}", "blocks.{i}.{rest}"),)            # blocks of the training code stand in chunks, numbered through


def keymap(config: Any) -> KeyMap:
    c = config.backbone
    registers = (rule("register_tokens", "body.registers"),) if hasattr(c.body, "registers") else ()
    mlp = (*(r for r in VISION.rules if "mlp" not in r.ours[0]), *GATED) if gated(c) else VISION.rules
    vision = KeyMap((*mlp, *registers), alias=CHUNKED)
    return owned(vision, KeyMap((rule("mask_token", "hide.token", lead1),)), config)


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    width, patch = size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3)
    image, many = patch * side(size(state, "pos_embed", 1)), state["register_tokens"].shape[1] if "register_tokens" in state else 0
    big = "blocks.0.mlp.w12.weight" in state
    few = {"config.backbone.image_size": image, "config.backbone.patch": patch, "config.backbone.resize": "antialias" if many else "plain",
           "config.backbone.offset": 0.0 if many else 0.1,
           **body("config.backbone.body", width=width, depth=count(state, "blocks"), heads=max(1, width // HEAD_WIDTH),
                  hidden=0 if big else size(state, "blocks.0.mlp.fc1.weight"))}
    if big:
        few = {k: v for k, v in few.items() if ".mlp." not in k} | swiglu(size(state, "blocks.0.mlp.w3.weight", 1))
    return ("features_registers" if many else "features"), registered(few, many)


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this tower."""
    of = sized(config)
    if of["eps"] != 1e-6 or of["bias"] != ALL or of["heads"] != max(1, of["width"] // HEAD_WIDTH):
        raise UserError("the authors' ViT has eps 1e-6, all biases and heads of 64 numbers", "export to hf")
    return {}


LAYOUT = Layout(of="dinov2", name="facebook", keymap=keymap, read=read, write=write, config_file="", weights_file="dinov2.pth")
