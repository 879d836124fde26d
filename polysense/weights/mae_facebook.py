"""MAE as its authors publish it: `mae_visualize_vit_large.pth` and training checkpoints, a state under "model", without a configuration.

`mae_pretrain_vit_*.pth` hold the encoder alone: they are ViTs in timm's names.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.mae_hf import plain
from polysense.weights.sizes import Dict, body, body_of, count, side, size
from polysense.weights.vit_timm import VISION

HEADS = {1280: 16}                           # by width, where it is not one for every 64 (encoder) or 32 (decoder) numbers

DECODER = KeyMap((
    rule("mask_token", "token"), rule("decoder_pos_embed", "position"), *both("decoder_embed", "embed"), *both("decoder_pred", "head"),
    *both("decoder_norm", "body.norm"),
    *(rule(f"decoder_blocks.{{i}}.attn.qkv.{p}", tuple(f"body.blocks.{{i}}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
    *both("decoder_blocks.{i}.attn.proj", "body.blocks.{i}.attn.out"),
    *both("decoder_blocks.{i}.norm1", "body.blocks.{i}.norm1"), *both("decoder_blocks.{i}.norm2", "body.blocks.{i}.norm2"),
    *both("decoder_blocks.{i}.mlp.fc1", "body.blocks.{i}.mlp.up"), *both("decoder_blocks.{i}.mlp.fc2", "body.blocks.{i}.mlp.down"),
))


def heads(width: int, each: int) -> int:
    return HEADS.get(width, max(1, width // each))


def keymap(config: Any) -> KeyMap:
    return VISION.at("", "encoder") + DECODER.at("", "decoder")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes: heads have 64 numbers in the encoder (ViT-H: 80) and 32 in the decoder, eps is 1e-6.

    Whether targets were normalised is not in the file; the released one with a decoder was trained on plain pixels.
    """
    if "decoder_embed.weight" not in state:
        raise UserError("this file has no decoder: it is an encoder alone", "open it as the system vit in the layout timm")
    width, patch, narrow = size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3), size(state, "decoder_embed.weight")
    image = patch * side(size(state, "pos_embed", 1))
    return "vit_b_16", {
        "config.encoder.image_size": image, "config.encoder.patch": patch, "config.target.patch": patch, "config.target.norm": "none",
        "feed.image.size": image, "feed.train_image.size": image,
        **body("config.encoder.body", width=width, depth=count(state, "blocks"), heads=heads(width, 64),
               hidden=size(state, "blocks.0.mlp.fc1.weight")),
        **body("config.decoder.body", width=narrow, depth=count(state, "decoder_blocks"), heads=heads(narrow, 32),
               hidden=size(state, "decoder_blocks.0.mlp.fc1.weight"))}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    a, b = (body_of(part.body, "facebook") for part in (config.encoder, config.decoder))
    if not plain(config) or {a["act"], b["act"]} != {"gelu"} or {a["eps"], b["eps"]} != {1e-6} \
            or (a["heads"], b["heads"]) != (heads(a["width"], 64), heads(b["width"], 32)):
        raise UserError("the authors' MAE cannot hold this system", "it has GELU, eps 1e-6, heads of 64 and 32 numbers; export to hf")
    return {}


LAYOUT = Layout(of="mae", name="facebook", keymap=keymap, read=read, write=write, config_file="", weights_file="mae.pth")
