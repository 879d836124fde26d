"""BEiT v2 as its authors publish it (unilm): BEiT's names with `cls_pt_layers.*` beside them, and the tokenizer VQ-KD."""
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.weights.beit import read_unilm, unilm_keymap
from polysense.weights.keymap import KeyMap, Op, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, count, side, size

OURS, THEIRS = "aggregate.blocks.{i}", "cls_pt_layers.{i}"
BRANCH = KeyMap((
    rule(f"{THEIRS}.attn.qkv.weight", tuple(f"{OURS}.attn.{n}.weight" for n in "qkv"), stack3),
    *(rule(f"{THEIRS}.attn.{n}_bias", f"{OURS}.attn.{n}.bias") for n in "qv"), *both(f"{THEIRS}.attn.proj", f"{OURS}.attn.out"),
    *both(f"{THEIRS}.norm1", f"{OURS}.norm1"), *both(f"{THEIRS}.norm2", f"{OURS}.norm2"), *both(f"{THEIRS}.mlp.fc1", f"{OURS}.mlp.up"),
    *both(f"{THEIRS}.mlp.fc2", f"{OURS}.mlp.down"), *(rule(f"{THEIRS}.gamma_{n}", f"{OURS}.scale{n}") for n in (1, 2))))


def keymap(config: Any) -> KeyMap:
    return unilm_keymap(config) + BRANCH


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. Which layer lends its patches is not in the file: three quarters up (9 of 12; ViT-L's 21 of 24 says
    `convert --set config.early=21`)."""
    _, out = read_unilm(config, state)
    codes, at = size(state, "lm_head.weight"), "config.encoder.body"
    depth, grid, patch = out[f"{at}.depth"], out[f"{at}.relative.grid"][0], out["config.encoder.patch"]
    keep = {k: v for k, v in out.items() if not k.startswith("config.target.")}
    return "paper", {
        **keep, "config.early": max(1, round(depth * 0.75)), "config.target.codec.codes": codes, "config.target.size": grid * patch,
        "config.target.codec.encoder.image_size": grid * patch, "config.target.codec.encoder.patch": patch,
        **{f"config.aggregate.{k}": out[f"{at}.{k}"] for k in ("width", "heads", "block.mlp.hidden", "block.layer_scale", "block.norm.eps")},
        "config.aggregate.depth": count(state, "cls_pt_layers")}


# Keys have no bias there; here they have one, which changes nothing: it adds the same to all scores of a query.
no_key = Op("no_key", lambda t: [t[0], torch.zeros_like(t[0]), t[1]], lambda t: [t[0], t[2]])
first = Op("first", lambda t: t[:1], lambda t: [t[0], t[0]])           # the second is an average that nothing reads
lone = Op("lone", lambda t: [t[0].reshape(())], lambda t: [t[0].reshape(1)])
BLOCK = "body.blocks.{i}"
VIT = KeyMap((
    rule("cls_token", "cls"), rule("pos_embed", "position"), *both("patch_embed.proj", "patch"), *both("fc_norm", "body.norm"),
    rule("blocks.{i}.attn.qkv.weight", tuple(f"{BLOCK}.attn.{n}.weight" for n in "qkv"), stack3),
    rule(("blocks.{i}.attn.q_bias", "blocks.{i}.attn.v_bias"), tuple(f"{BLOCK}.attn.{n}.bias" for n in "qkv"), no_key),
    *both("blocks.{i}.attn.proj", f"{BLOCK}.attn.out"), *both("blocks.{i}.norm1", f"{BLOCK}.norm1"), *both("blocks.{i}.norm2", f"{BLOCK}.norm2"),
    *both("blocks.{i}.mlp.fc1", f"{BLOCK}.mlp.up"), *both("blocks.{i}.mlp.fc2", f"{BLOCK}.mlp.down")))
TOKEN = KeyMap((*VIT.at("encoder", "codec.encoder").rules, *VIT.at("decoder", "decoder").rules,
                *both("encode_task_layer.0", "codec.narrow.pre"), *both("encode_task_layer.2", "codec.narrow.out"),
                *both("decode_task_layer.0", "widen.pre"), *both("decode_task_layer.2", "widen.out"),
                rule(("quantize.embedding.weight", "quantize.embedding.embed_avg"), "codec.quantizer.codebook", first),
                rule(("quantize.cluster_size", "quantize.embedding.cluster_size"), "codec.quantizer.count", first),
                rule("quantize.embedding.initted", "codec.quantizer.begun", lone)),
               drop=(r"scaling_layer\..*", r"teacher_model\..*"), own=(r"teacher\..*",))


def read_tokenizer(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes; heads are 64 wide. The teacher, a CLIP, is published on its own."""
    width, patch = size(state, "encoder.patch_embed.proj.weight"), size(state, "encoder.patch_embed.proj.weight", 3)
    grid, said, at = side(size(state, "encoder.pos_embed", 1)), size(state, "decode_task_layer.2.weight"), "config.codec"
    narrow, image = size(state, "decoder.patch_embed.proj.weight"), grid * patch
    teacher = {f"config.teacher.{k}": v for k, v in {"width": said, "head.out": said, "size": image, "tower.image_size": image,
                                                     "tower.patch": patch}.items()}
    return "paper_tokenizer", {
        f"{at}.encoder.image_size": image, f"{at}.encoder.patch": patch, f"{at}.codes": size(state, "quantize.embedding.weight"),
        f"{at}.width": size(state, "quantize.embedding.weight", 1), "config.decoder.image_size": grid,
        "config.decoder.channels": size(state, "decoder.patch_embed.proj.weight", 1), "feed.image.size": image,
        "feed.train_image.size": image, **teacher,
        **body(f"{at}.encoder.body", width=width, depth=count(state, "encoder.blocks"), heads=max(1, width // 64),
               hidden=size(state, "encoder.blocks.0.mlp.fc1.weight")),
        **body("config.decoder.body", width=narrow, depth=count(state, "decoder.blocks"), heads=max(1, narrow // 64),
               hidden=size(state, "decoder.blocks.0.mlp.fc1.weight"))}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    if config.encoder.body.block.layer_scale is None or config.encoder.body.block.norm.eps != 1e-6:
        raise UserError("the authors' BEiT v2 cannot hold this system", "its branches are scaled, eps is 1e-6")
    return {}


UNILM = Layout(of="beit_v2", name="unilm", keymap=keymap, read=read, write=write, config_file="", weights_file="beitv2.pth")
TOKENIZER = Layout(of="beit_v2", name="unilm_tokenizer", keymap=lambda config: TOKEN, read=read_tokenizer, write=lambda config: {}, config_file="",
                   weights_file="vqkd.pth")
