"""data2vec for pictures as transformers has it: Data2VecVisionModel, BEiT's tower under its older names. Neither head nor average is published."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.beit import INDEX
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, hf_feed, side, single, to_hf_feed

LAYER, OURS = "encoder.layer.{i}", "body.blocks.{i}"
TABLE = "encoder.relative_position_bias.relative_position_bias_table"
TOWER = KeyMap((
    rule("embeddings.cls_token", "cls"), *both("embeddings.patch_embeddings.projection", "patch"), rule(TABLE, "body.relative.table"),
    *(rule(f"{LAYER}.attention.attention.{t}.weight", f"{OURS}.attn.{o}.weight") for t, o in (("query", "q"), ("key", "k"), ("value", "v"))),
    *(rule(f"{LAYER}.attention.attention.{t}.bias", f"{OURS}.attn.{o}.bias") for t, o in (("query", "q"), ("value", "v"))),
    *both(f"{LAYER}.attention.output.dense", f"{OURS}.attn.out"), *both(f"{LAYER}.layernorm_before", f"{OURS}.norm1"),
    *both(f"{LAYER}.layernorm_after", f"{OURS}.norm2"), *both(f"{LAYER}.intermediate.dense", f"{OURS}.mlp.up"),
    *both(f"{LAYER}.output.dense", f"{OURS}.mlp.down"), *(rule(f"{LAYER}.lambda_{n}", f"{OURS}.scale{n}") for n in (1, 2))))
ALIAS = (("data2vec_vision.{rest}", "{rest}"),)              # a model with a head names its tower
OWN = (r"target\..*", r"decoder\..*", r"encoder\.body\.norm\..*")


def keymap(config: Any) -> KeyMap:
    drop = (*INDEX, r"pooler\..*", r"layernorm\..*")
    return KeyMap((*TOWER.at("", "encoder").rules, rule("embeddings.mask_token", "hide.token")), drop, ALIAS, OWN)


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`. UserError for absolute positions or one table a layer (the fine-tuned ones)."""
    if config.get("model_type") != "data2vec-vision":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}",
                        "give the folder of a Data2VecVisionModel")
    rows = next((v.shape[0] for k, v in state.items() if k.endswith(TABLE)), 0)
    if not rows or config.get("use_absolute_position_embeddings") or not config.get("use_shared_relative_position_bias"):
        raise UserError("this data2vec has no table of relative positions that its layers share", "pre-trained models have one; others are not read")
    grid, patch = (side(rows - 3, 0) + 1) // 2, single(config.get("patch_size", 16))
    depth, eps, at = int(config.get("num_hidden_layers", 12)), float(config.get("layer_norm_eps", 1e-12)), "config.encoder.body"
    return "paper", {
        "config.encoder.image_size": grid * patch, "config.encoder.patch": patch, f"{at}.width": int(config.get("hidden_size", 768)),
        f"{at}.depth": depth, f"{at}.heads": int(config.get("num_attention_heads", 12)), f"{at}.relative.grid": (grid, grid),
        f"{at}.block.mlp.hidden": int(config.get("intermediate_size", 3072)), f"{at}.block.norm.eps": eps, f"{at}.norm.eps": eps,
        f"{at}.block.layer_scale": float(config.get("layer_scale_init_value", 0.1)), f"{at}.drop_path": float(config.get("drop_path_rate", 0.1)),
        "config.target.top": min(6, depth), "config.sampler.hidden": round(120 / 196 * grid * grid),
        "config.sampler.least": max(1, round(16 / 196 * grid * grid)), **hf_feed(config, grid * patch)}


def write(config: Any) -> Dict:
    """`config.json` of a Data2VecVisionModel. transformers gives it no norm behind the last block: it is left out."""
    v = config.encoder
    body, block = v.body, v.body.block
    if v.pool != "mean" or v.position != "none" or block.layer_scale is None or v.prefix != 1 or not hasattr(body, "relative"):
        raise UserError("this layout holds BEiT's tower only", "mean pooling, one table of relative positions, layer scale, one class token")
    return {"architectures": ["Data2VecVisionModel"], "model_type": "data2vec-vision", "dtype": "float32", "hidden_size": body.width,
            "num_hidden_layers": body.depth, "num_attention_heads": body.heads, "hidden_act": act_name(block.mlp.act, "hf"),
            "intermediate_size": block.mlp.hidden or int(block.mlp.ratio * body.width), "layer_norm_eps": block.norm.eps,
            "image_size": v.image_size, "patch_size": v.patch, "num_channels": v.channels, "use_mask_token": True, "use_mean_pooling": True,
            "use_absolute_position_embeddings": False, "use_relative_position_bias": False, "use_shared_relative_position_bias": True,
            "layer_scale_init_value": block.layer_scale, "drop_path_rate": body.drop_path, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}


def feed(of: Feed) -> Dict:
    return to_hf_feed(of, "BeitImageProcessor")


HF = Layout(of="data2vec_vision", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
