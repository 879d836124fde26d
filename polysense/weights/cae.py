"""CAE as its authors publish it: `encoder.*`, `teacher.*` (the encoder again), `pretext_neck.*` and `mask_token`; no configuration."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Rule, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, side, size

QV = "q v out"


def _block(theirs: str, ours: str) -> list[Rule]:
    """One of BEiT's blocks: query, key and value in one, biases of query and value."""
    return [rule(f"{theirs}.attn.qkv.weight", tuple(f"{ours}.attn.{n}.weight" for n in "qkv"), stack3),
            *(rule(f"{theirs}.attn.{n}_bias", f"{ours}.attn.{n}.bias") for n in "qv"), *both(f"{theirs}.attn.proj", f"{ours}.attn.out"),
            *both(f"{theirs}.norm1", f"{ours}.norm1"), *both(f"{theirs}.norm2", f"{ours}.norm2"), *both(f"{theirs}.mlp.fc1", f"{ours}.mlp.up"),
            *both(f"{theirs}.mlp.fc2", f"{ours}.mlp.down"), *(rule(f"{theirs}.gamma_{n}", f"{ours}.scale{n}") for n in (1, 2))]


TOWER = KeyMap((rule("cls_token", "cls"), rule("pos_embed", "position"), *both("patch_embed.proj", "patch"), *both("norm", "body.norm"),
                *_block("blocks.{i}", "body.blocks.{i}")))

ASKS, OURS = "regressor_blocks.{i}", "blocks.{i}"
NECK = KeyMap((
    *(r for n in "qkv" for r in both(f"{ASKS}.norm1_{n}", f"{OURS}.norm_{n}")), *both(f"{ASKS}.norm2_cross", f"{OURS}.norm"),
    *(rule(f"{ASKS}.cross_attn.{n}.weight", f"{OURS}.attn.{n}.weight") for n in "qkv"),
    *(rule(f"{ASKS}.cross_attn.{n}_bias", f"{OURS}.attn.{n}.bias") for n in "qv"), *both(f"{ASKS}.cross_attn.proj", f"{OURS}.attn.out"),
    *both(f"{ASKS}.mlp_cross.fc1", f"{OURS}.mlp.up"), *both(f"{ASKS}.mlp_cross.fc2", f"{OURS}.mlp.down"),
    *(rule(f"{ASKS}.gamma_{n}_cross", f"{OURS}.scale{n}") for n in (1, 2)),
    *_block("decoder_blocks.{i}", "body.blocks.{i}"), *both("norm", "norm"), *both("norm2", "body.norm"), *both("head", "head")))


def keymap(config: Any) -> KeyMap:
    return (TOWER.at("encoder", "encoder") + TOWER.at("teacher", "target.teacher.module") + NECK.at("pretext_neck", "decoder")
            + KeyMap((rule("mask_token", "decoder.token"),), own=(r"target\.truth\..*", r"decoder\.position", r"visible\..*")))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes: heads have 64 numbers. The tokenizer is published on its own."""
    if "encoder_to_decoder.weight" in state:
        raise UserError("this CAE has a regressor narrower than its encoder", "only equal widths are read, as the released ones have them")
    if "encoder.blocks.0.gamma_1" not in state:
        raise UserError("this CAE has no layer scale", "only the published form is read")
    width, patch = size(state, "encoder.patch_embed.proj.weight"), size(state, "encoder.patch_embed.proj.weight", 3)
    grid, heads = side(size(state, "encoder.pos_embed", 1)), max(1, width // 64)
    image, scale = grid * patch, 0.1 if float(state["encoder.blocks.0.gamma_1"].float().abs().mean()) > 1e-3 else 1e-5
    at, neck = "config.encoder.body", "config.decoder.body"
    return "paper", {
        "config.encoder.image_size": image, "config.encoder.patch": patch, "config.decoder.depth": count(state, "pretext_neck.regressor_blocks"),
        "config.decoder.block.mlp.hidden": size(state, "pretext_neck.regressor_blocks.0.mlp_cross.fc1.weight"),
        "config.target.truth.codec.encoder.codes": size(state, "pretext_neck.head.weight"), "config.target.truth.size": grid * 8,
        "config.sampler.hidden": grid * grid // 2, "config.sampler.least": max(1, round(16 / 196 * grid * grid)),
        "feed.image.size": image, "feed.train_image.size": image,
        **{f"{p}.block.layer_scale": scale for p in (at, neck, "config.decoder")},
        **body(at, width=width, heads=heads, depth=count(state, "encoder.blocks"), hidden=size(state, "encoder.blocks.0.mlp.fc1.weight")),
        **body(neck, width=width, heads=heads, depth=count(state, "pretext_neck.decoder_blocks"),
               hidden=size(state, "pretext_neck.decoder_blocks.0.mlp.fc1.weight"))}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    parts = [body_of(part.body, "official", scales="some", biases=(QV,)) for part in (config.encoder, config.decoder)]
    if any(p["act"] != "gelu" or p["eps"] != 1e-6 for p in parts) or config.encoder.position != "sincos":
        raise UserError("the authors' CAE cannot hold this system", "it has GELU, eps 1e-6, fixed positions")
    return {}


LAYOUT = Layout(of="cae", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="cae.pth")
