"""DINOv2's towers as transformers publishes them: Dinov2Model and Dinov2WithRegistersModel (facebook/dinov2-small and its like).

A file is the backbone that transfer reads, and the mask token; what else a system in training has, their files have no name for.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, State, both, lead1, rule, stack
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, NO_QKV, Dict, act_name, body, hf_feed, single, to_hf_feed

LAYER = "encoder.layer.{i}"
MEMORY = tuple((f"{LAYER}.attention.{a}_proj.{{rest}}", f"{LAYER}.attention.{b}.{{rest}}") for a, b in (
    ("q", "attention.query"), ("k", "attention.key"), ("v", "attention.value"), ("o", "output.dense")))
TRAINING = (r"heat", r"(backbone|projector|patch_head|guide|centre|patch_centre|teacher\.module\.(projector|patch_head))\..*")

BLOCKS = (
    rule("embeddings.cls_token", "cls"), rule("embeddings.position_embeddings", "position"),
    *both("embeddings.patch_embeddings.projection", "patch"), *both("layernorm", "body.norm"),
    *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{LAYER}.attention.attention.{t}", f"body.blocks.{{i}}.attn.{o}")),
    *both(f"{LAYER}.attention.output.dense", "body.blocks.{i}.attn.out"),
    *both(f"{LAYER}.norm1", "body.blocks.{i}.norm1"), *both(f"{LAYER}.norm2", "body.blocks.{i}.norm2"),
    *(rule(f"{LAYER}.layer_scale{n}.lambda1", f"body.blocks.{{i}}.scale{n}") for n in (1, 2)))
PLAIN = (*both(f"{LAYER}.mlp.fc1", "body.blocks.{i}.mlp.up"), *both(f"{LAYER}.mlp.fc2", "body.blocks.{i}.mlp.down"))
GATED = (*(rule(f"{LAYER}.mlp.weights_in.{p}", (f"body.blocks.{{i}}.mlp.gate.{p}", f"body.blocks.{{i}}.mlp.up.{p}"), stack(2))
           for p in ("weight", "bias")), *both(f"{LAYER}.mlp.weights_out", "body.blocks.{i}.mlp.down"))


def gated(c: Any) -> bool:
    return "gate" in c.body.block.mlp.bias.split()


def owned(vision: KeyMap, token: KeyMap, config: Any) -> KeyMap:
    """The table of the backbone that transfer reads, and of the mask token."""
    at = "teacher.module.backbone" if config.teacher is not None else "backbone"
    return vision.at("", at) + token + KeyMap((), own=TRAINING if config.teacher is not None else (r"heat", r"(projector|centre|patch_centre)\..*"))


def keymap(config: Any) -> KeyMap:
    c = config.backbone
    registers = (rule("embeddings.register_tokens", "body.registers"),) if hasattr(c.body, "registers") else ()
    vision = KeyMap((*BLOCKS, *(GATED if gated(c) else PLAIN), *registers), alias=MEMORY)
    return owned(vision, KeyMap((rule("embeddings.mask_token", "hide.token", lead1),)), config)


def swiglu(hidden: int) -> Dict:
    return {"config.backbone.body.block.mlp": from_dict({"is": "polysense.nn.mlp:GatedMLP.Config", "hidden": hidden, "bias": "gate up down"})}


def registered(of: Dict, registers: int) -> Dict:
    """The same overrides for a body with registers: their class goes first."""
    return of | {"config.backbone.body.registers": registers} if registers else of


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`."""
    kind = config.get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {kind!r}, not 'dinov2'",
                        "give the folder of a Dinov2Model or a Dinov2WithRegistersModel")
    width, image = config.get("hidden_size", 768), single(config.get("image_size", 224))
    hidden = int(width * config.get("mlp_ratio", 4))
    few = {"config.backbone.image_size": image, "config.backbone.patch": single(config.get("patch_size", 14)),
           "config.backbone.resize": "plain" if kind == "dinov2" else "antialias", "config.backbone.offset": 0.0,
           **body("config.backbone.body", width=width, depth=config.get("num_hidden_layers", 12), heads=config.get("num_attention_heads", 12),
                  hidden=hidden, act=config.get("hidden_act", "gelu"), eps=config.get("layer_norm_eps", 1e-6)),
           "config.backbone.body.block.attn.bias": ALL if config.get("qkv_bias", True) else NO_QKV}
    if config.get("use_swiglu_ffn"):
        few = {k: v for k, v in few.items() if ".mlp." not in k} | swiglu((int(hidden * 2 / 3) + 7) // 8 * 8)
    feed = {k: v for k, v in hf_feed(config, 224).items() if "train_image" not in k}
    many = config.get("num_register_tokens", 4) if kind != "dinov2" else 0
    return ("features_registers" if many else "features"), registered(few, many) | feed


def sized(config: Any) -> Dict:
    """Sizes of a backbone. UserError for one that no published DINOv2 has."""
    c, block = config.backbone, config.backbone.body.block
    if not hasattr(c, "resize") or c.norm_pre is not None or c.prefix != 1 or c.stem is not None or not c.patch_bias or c.pool != "cls" \
            or c.position != "learned" or isinstance(block, tuple) or block.layer_scale is None:
        raise UserError("published DINOv2s have a plain ViT with layer scale that reads its one class token", "keep the run folder")
    hidden = block.mlp.hidden or int(block.mlp.ratio * c.width)
    if gated(c) and hidden != (int(4 * c.width * 2 / 3) + 7) // 8 * 8:
        raise UserError(f"a gated MLP of {hidden} units", "published ones have two thirds of four times the width, rounded up to eights")
    return {"width": c.width, "depth": c.body.depth, "heads": c.body.heads, "hidden": hidden, "eps": block.norm.eps, "bias": block.attn.bias}


def write(config: Any) -> Dict:
    """`config.json` of a Dinov2Model or a Dinov2WithRegistersModel."""
    c, of, many = config.backbone, sized(config), getattr(config.backbone.body, "registers", 0)
    if c.offset or c.resize != ("antialias" if many else "plain"):
        raise UserError("transformers interpolates positions plainly, and with registers antialiased", "set backbone.resize and backbone.offset so")
    if of["hidden"] % of["width"] and not gated(c):
        raise UserError(f"an MLP of {of['hidden']} units on a width of {of['width']}", "transformers wants a whole ratio")
    name = "Dinov2WithRegistersModel" if many else "Dinov2Model"
    return {"architectures": [name], "model_type": "dinov2_with_registers" if many else "dinov2", "dtype": "float32", "image_size": c.image_size,
            "patch_size": c.patch, "num_channels": c.channels, "hidden_size": of["width"], "num_hidden_layers": of["depth"],
            "num_attention_heads": of["heads"], "mlp_ratio": 4 if gated(c) else of["hidden"] // of["width"], "layer_norm_eps": of["eps"],
            "hidden_act": "gelu" if gated(c) else act_name(c.body.block.mlp.act, "hf"), "qkv_bias": of["bias"] == ALL, "use_swiglu_ffn": gated(c),
            "layerscale_value": c.body.block.layer_scale, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
            "apply_layernorm": True, "use_mask_token": True, **({"num_register_tokens": many} if many else {})}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "BitImageProcessor")


LAYOUT = Layout(of="dinov2", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
