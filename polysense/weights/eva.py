"""EVA as its authors publish it: `eva_psz14.pt`, timm's ViT names with `q_bias` and `v_bias` beside a fused qkv, `mask_token` and `lm_head`."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count, side, size

OURS = "body.blocks.{i}"
TOWER = KeyMap((
    rule("cls_token", "cls"), rule("pos_embed", "position"), *both("patch_embed.proj", "patch"), *both("norm", "body.norm"),
    rule("blocks.{i}.attn.qkv.weight", tuple(f"{OURS}.attn.{n}.weight" for n in "qkv"), stack3),
    *(rule(f"blocks.{{i}}.attn.{n}_bias", f"{OURS}.attn.{n}.bias") for n in "qv"),
    *both("blocks.{i}.attn.proj", f"{OURS}.attn.out"), *both("blocks.{i}.norm1", f"{OURS}.norm1"), *both("blocks.{i}.norm2", f"{OURS}.norm2"),
    *both("blocks.{i}.mlp.fc1", f"{OURS}.mlp.up"), *both("blocks.{i}.mlp.fc2", f"{OURS}.mlp.down")))
KEYMAP = KeyMap((*TOWER.at("", "encoder").rules, rule("mask_token", "hide.token"), *both("lm_head", "decoder.head")), own=(r"target\..*",))
HEADS = {1408: 16}                           # by width, where heads are not 64 wide


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes. The teacher is published on its own (CLIP): of the file's own form, with the width its head has."""
    if "lm_head.weight" not in state:
        raise UserError("this file has no head for features: it is fine-tuned", "give the pre-trained one, such as eva_psz14.pt")
    width, patch, said = size(state, "patch_embed.proj.weight"), size(state, "patch_embed.proj.weight", 3), size(state, "lm_head.weight")
    grid = side(size(state, "pos_embed", 1))
    image = grid * patch
    return "paper", {
        "config.encoder.image_size": image, "config.encoder.patch": patch, "config.target.width": said, "config.target.head.out": said,
        "config.target.tower.image_size": image, "config.target.tower.patch": patch, "config.sampler.hidden": round(105 / 256 * grid * grid),
        "config.sampler.least": max(1, round(16 / 256 * grid * grid)), "feed.image.size": image, "feed.train_image.size": image,
        **body("config.encoder.body", width=width, depth=count(state, "blocks"), heads=HEADS.get(width, max(1, width // 64)),
               hidden=size(state, "blocks.0.mlp.fc1.weight"))}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    v, of = config.encoder, body_of(config.encoder.body, "baai", biases=("q v out",))
    if v.position != "learned" or v.prefix != 1 or v.norm_pre is not None or of["eps"] != 1e-6 or of["act"] != "gelu" \
            or of["heads"] != HEADS.get(of["width"], max(1, of["width"] // 64)):
        raise UserError("the authors' EVA cannot hold this system", "it has learned positions, GELU, eps 1e-6, heads 64 wide (88 of 1408)")
    return {}


BAAI = Layout(of="eva", name="baai", keymap=lambda config: KEYMAP, read=read, write=write, config_file="", weights_file="eva.pt")
