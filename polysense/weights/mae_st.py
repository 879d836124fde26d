"""MAE-ST as its authors publish it: `mae_pretrain_vit_large_k400.pth` and its like, and the encoders that PySlowFast writes. No configuration.

PySlowFast's decoder is another one (it reads the encoder's class token, and has one joint table of positions): of its files the encoder is taken.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Rule, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.mae_facebook import heads
from polysense.weights.sizes import Dict, body, body_of, count, side, size


def _block(theirs: str, ours: str) -> list[Rule]:
    return [*both(f"{theirs}.attn.proj", f"{ours}.attn.out"), *both(f"{theirs}.norm1", f"{ours}.norm1"), *both(f"{theirs}.norm2", f"{ours}.norm2"),
            *both(f"{theirs}.mlp.fc1", f"{ours}.mlp.up"), *both(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")]


def _apart(theirs: str, ours: str) -> list[Rule]:
    """Queries, keys and values each on their own."""
    return [r for n in "qkv" for r in both(f"{theirs}.attn.{n}", f"{ours}.attn.{n}")]


def _joint(theirs: str, ours: str) -> list[Rule]:
    """In one."""
    return [rule(f"{theirs}.attn.qkv.{p}", tuple(f"{ours}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")]


PLACES = (("spatial", "space"), ("temporal", "time"), ("class", "first"))
TOWER = (rule("cls_token", "cls"), *both("patch_embed.proj", "patch"), *both("norm", "body.norm"),
         *(rule(f"pos_embed_{a}", f"place.{b}") for a, b in PLACES), *_block("blocks.{i}", "body.blocks.{i}"))
DECODER = KeyMap((
    rule("mask_token", "token"), rule("decoder_cls_token", "cls"), *both("decoder_embed", "embed"), *both("decoder_pred", "head"),
    *both("decoder_norm", "body.norm"), *(rule(f"decoder_pos_embed_{a}", f"place.{b}") for a, b in PLACES),
    *_block("decoder_blocks.{i}", "body.blocks.{i}"), *_apart("decoder_blocks.{i}", "body.blocks.{i}")))
OFFICIAL = KeyMap((*TOWER, *_apart("blocks.{i}", "body.blocks.{i}"))).at("", "encoder") + DECODER.at("", "decoder")
LEFT = (r"dec(oder)?_.*", r"pred_head\..*", r"mask_token")
ENCODER = KeyMap((*TOWER, *_joint("blocks.{i}", "body.blocks.{i}"))).at("", "encoder") + KeyMap((), LEFT, own=(r"decoder\..*",))


def _encoder(state: State) -> tuple[int, int, Dict]:
    """(side of a patch, times of the grid, overrides) from the shapes: heads have 64 numbers (ViT-H: 80), eps is 1e-6."""
    if "pos_embed_spatial" not in state or "pos_embed_class" not in state:
        raise UserError("this file has no separable positions, or no class token", "only the published form is read")
    width, tubelet, patch = (size(state, "patch_embed.proj.weight", axis) for axis in (0, 2, 4))
    times, image = size(state, "pos_embed_temporal", 1), patch * side(size(state, "pos_embed_spatial", 1), 0)
    at, frames = "config.encoder", times * tubelet
    return patch, times, {
        f"{at}.image_size": image, f"{at}.patch": patch, f"{at}.tubelet": tubelet, f"{at}.frames": frames, "config.target.patch": patch,
        "feed.image.size": image, "feed.video.frames": frames, "feed.video.view.size": image,
        **body(f"{at}.body", width=width, depth=count(state, "blocks"), heads=heads(width, 64), hidden=size(state, "blocks.0.mlp.fc1.weight"))}


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes; heads of the decoder have 32 numbers. Whether targets were normalised is not in the file; the released
    ones were."""
    patch, times, out = _encoder(state)
    narrow, said = size(state, "decoder_embed.weight"), size(state, "decoder_pred.weight")
    if said % (3 * patch * patch):
        raise UserError(f"its head predicts {said} numbers of a cube of {patch} pixels", "they are those of whole frames of three colours")
    each = said // (3 * patch * patch)
    return "paper", out | {"config.target.frames": each, "config.target.said": each * times, **body(
        "config.decoder.body", width=narrow, depth=count(state, "decoder_blocks"), heads=heads(narrow, 32),
        hidden=size(state, "decoder_blocks.0.mlp.fc1.weight"))}


def read_slowfast(config: Dict, state: State) -> tuple[str, Dict]:
    """The encoder; the decoder is that of the paper, untrained."""
    _, times, out = _encoder(state)
    return "paper", out | {"config.target.said": times}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    a, b = (body_of(part.body, "official") for part in (config.encoder, config.decoder))
    if {a["act"], b["act"]} != {"gelu"} or {a["eps"], b["eps"]} != {1e-6} or config.encoder.prefix != 1 \
            or (a["heads"], b["heads"]) != (heads(a["width"], 64), heads(b["width"], 32)):
        raise UserError("the authors' MAE-ST cannot hold this system", "it has a class token, GELU, eps 1e-6, heads of 64 and 32 numbers")
    return {}


LAYOUT = Layout(of="mae_st", name="official", keymap=lambda config: OFFICIAL, read=read, write=write, config_file="", weights_file="mae_st.pth")
SLOWFAST = Layout(of="mae_st", name="slowfast", keymap=lambda config: ENCODER, read=read_slowfast, write=write, config_file="",
                  weights_file="mae_st.pyth")
