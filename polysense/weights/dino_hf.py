"""DINO's backbone as transformers publishes it: a ViTModel without pooler (facebook/dino-vits16 and its like).

It is the teacher's, so opening it gives a system for features and attention; a trained DINO writes its teacher's backbone, and nothing else.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, State
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, NO_QKV, Dict, act_name, body_of, hf_feed, single, to_hf_feed
from polysense.weights.vit_hf import VISION, sizes

TRAINING = r"(backbone|projector|teacher\.module\.projector|centre)\..*"


def backbone(vision: KeyMap, config: Any) -> KeyMap:
    """The table of the backbone that transfer reads; the rest of a system in training has no name in their files."""
    if config.teacher is not None:
        return vision.at("", "teacher.module.backbone") + KeyMap((), own=("heat", TRAINING))
    return vision.at("", "backbone") + KeyMap((), own=("heat", r"(projector|centre)\..*"))


def keymap(config: Any) -> KeyMap:
    return backbone(VISION, config) + KeyMap((), drop=(r"pooler\..*",))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`."""
    if config.get("model_type") != "vit":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'vit'",
                        "give the folder of a ViTModel such as facebook/dino-vits16")
    feed = hf_feed(config, single(config.get("image_size", 224)))
    return "features", sizes(config, "config.backbone") | {k: v for k, v in feed.items() if "train_image" not in k}


def plain(config: Any) -> None:
    """UserError for a backbone that no published DINO has."""
    v = config.backbone
    if hasattr(v, "layers") or v.norm_pre is not None or v.prefix != 1 or v.stem is not None or not v.patch_bias or v.pool != "cls" \
            or v.position != "learned":
        raise UserError("published DINOs have a plain ViT that reads its one class token", "keep the run folder")


def write(config: Any) -> Dict:
    """`config.json` of a ViTModel."""
    plain(config)
    v, of = config.backbone, body_of(config.backbone.body, "hf", biases=(ALL, NO_QKV))
    return {"architectures": ["ViTModel"], "model_type": "vit", "dtype": "float32", "image_size": v.image_size, "patch_size": v.patch,
            "num_channels": v.channels, "hidden_size": of["width"], "num_hidden_layers": of["depth"], "num_attention_heads": of["heads"],
            "intermediate_size": of["hidden"], "hidden_act": act_name(of["act"], "hf"), "layer_norm_eps": of["eps"], "qkv_bias": of["bias"] == ALL,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "ViTImageProcessor")


LAYOUT = Layout(of="dino", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
