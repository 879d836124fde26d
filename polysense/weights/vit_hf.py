"""ViT as transformers publishes it: ViTForImageClassification, and ViTModel with its pooler. VISION is the bare tower.

transformers 5 renames the blocks in memory and writes the published names back to disk; both are read, the published ones are written.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, NO_QKV, Dict, act_name, body, body_of, empty_head, hf_feed, single, size, to_hf_feed

LAYER = "encoder.layer.{i}"
IN_MEMORY = tuple((f"layers.{{i}}.{a}.{{rest}}", f"{LAYER}.{b}.{{rest}}") for a, b in (
    ("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"), ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"), ("layernorm_before", "layernorm_before"), ("layernorm_after", "layernorm_after")))

VISION = KeyMap((
    rule("embeddings.cls_token", "cls"), rule("embeddings.position_embeddings", "position"),
    *both("embeddings.patch_embeddings.projection", "patch"), *both("layernorm", "body.norm"),
    *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{LAYER}.attention.attention.{t}", f"body.blocks.{{i}}.attn.{o}")),
    *both(f"{LAYER}.attention.output.dense", "body.blocks.{i}.attn.out"),
    *both(f"{LAYER}.layernorm_before", "body.blocks.{i}.norm1"), *both(f"{LAYER}.layernorm_after", "body.blocks.{i}.norm2"),
    *both(f"{LAYER}.intermediate.dense", "body.blocks.{i}.mlp.up"), *both(f"{LAYER}.output.dense", "body.blocks.{i}.mlp.down"),
), drop=(r"embeddings\.mask_token",), alias=IN_MEMORY)


def keymap(config: Any) -> KeyMap:
    """A Classifier of a ViT: a dense head is `classifier` (the tower below `vit.`), a tanh layer is the pooler of a bare ViTModel."""
    if hasattr(config.head, "hidden"):
        return VISION.at("", "backbone") + KeyMap(both("pooler.dense", "head.pre"))
    if not hasattr(config.head, "out"):
        return VISION.at("", "backbone")
    return VISION.at("vit", "backbone") + KeyMap(both("classifier", "head"), drop=(r"vit\.pooler\..*",))


def sizes(config: Dict, at: str) -> Dict:
    """Overrides of a `ViT.Config` at a dotted path from transformers' ViT configuration."""
    return {f"{at}.image_size": single(config.get("image_size", 224)), f"{at}.patch": single(config.get("patch_size", 16)),
            **body(f"{at}.body", width=config.get("hidden_size", 768), depth=config.get("num_hidden_layers", 12),
                   heads=config.get("num_attention_heads", 12), hidden=config.get("intermediate_size", 3072),
                   act=config.get("hidden_act", "gelu"), eps=config.get("layer_norm_eps", 1e-12)),
            f"{at}.body.block.attn.bias": ALL if config.get("qkv_bias", True) else NO_QKV}


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`; which head there is from the state."""
    if config.get("model_type") != "vit":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'vit'",
                        "give the folder of a ViTForImageClassification or a ViTModel")
    width = config.get("hidden_size", 768)
    out = sizes(config, "config.backbone") | hf_feed(config, single(config.get("image_size", 224)))
    if "classifier.weight" in state:
        return "finetune", out | {"config.head.into": width, "config.head.out": size(state, "classifier.weight")}
    if "pooler.dense.weight" not in state:
        return "finetune", out | {"config.head": empty_head()}
    if config.get("pooler_act", "tanh") != "tanh":
        raise UserError(f"its pooler has the activation {config['pooler_act']!r}", "only tanh is read")
    head = from_dict({"is": "polysense.nn.head:TanhHead.Config", "into": width, "hidden": size(state, "pooler.dense.weight")})
    return "finetune", out | {"config.head": head}


def write(config: Any) -> Dict:
    """`config.json` of a ViTForImageClassification (dense head) or a ViTModel (tanh layer or none)."""
    v, of = config.backbone, body_of(config.backbone.body, "hf", biases=(ALL, NO_QKV))
    if v.norm_pre is not None or v.prefix != 1 or v.stem is not None or not v.patch_bias or v.pool != "cls":
        raise UserError("transformers' ViT cannot hold this tower", "it has one class token, which it reads, and no norm before the blocks")
    if getattr(config.head, "hidden", 0) and config.head.out:
        raise UserError("transformers' ViT has no head with a hidden layer", "export a dense head, or the tanh layer alone")
    classes = 0 if hasattr(config.head, "hidden") else getattr(config.head, "out", 0)
    return {"architectures": ["ViTForImageClassification" if classes else "ViTModel"], "model_type": "vit", "dtype": "float32",
            "image_size": v.image_size, "patch_size": v.patch, "num_channels": v.channels, "hidden_size": of["width"],
            "num_hidden_layers": of["depth"], "num_attention_heads": of["heads"], "intermediate_size": of["hidden"],
            "hidden_act": act_name(of["act"], "hf"), "layer_norm_eps": of["eps"], "qkv_bias": of["bias"] == ALL, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, **({"pooler_output_size": config.head.hidden} if hasattr(config.head, "hidden") else {}),
            **(labels(classes) if classes else {})}


def labels(classes: int) -> Dict:
    """transformers knows the number of classes only through their names."""
    return {"id2label": {str(i): f"LABEL_{i}" for i in range(classes)}, "label2id": {f"LABEL_{i}": i for i in range(classes)}}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "ViTImageProcessor")


LAYOUT = Layout(of="vit", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
