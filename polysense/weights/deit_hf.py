"""DeiT with its distillation token as transformers publishes it: DeiTForImageClassificationWithTeacher."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.deit_timm import OWN, beside, feed_of
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, NO_QKV, Dict, act_name, body_of, hf_feed, single, size, to_hf_feed
from polysense.weights.vit_hf import VISION, labels, sizes


def keymap(config: Any) -> KeyMap:
    """The two tokens, the tower of a ViT, two heads."""
    tokens = rule(("embeddings.cls_token", "embeddings.distillation_token"), "cls", beside)
    tower = KeyMap((tokens, *(r for r in VISION.rules if r.ours != ("cls",))), VISION.drop, VISION.alias)
    return tower.at("deit", "vision") + KeyMap((*both("cls_classifier", "head"), *both("distillation_classifier", "head_distilled")), own=OWN)


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`."""
    if config.get("model_type") != "deit" or "distillation_classifier.weight" not in state:
        raise UserError("config.json is missing or not of a DeiT with its teacher's head",
                        "give the folder of a DeiTForImageClassificationWithTeacher")
    width, classes = config.get("hidden_size", 768), size(state, "cls_classifier.weight")
    return "paper", {**sizes(config, "config.vision"), "config.vision.prefix": 2, "config.teacher": None, "config.head.into": width,
                     "config.head.out": classes, "config.mix.classes": classes, **feed_of(hf_feed(config, single(config.get("image_size", 224))))}


def write(config: Any) -> Dict:
    """`config.json`."""
    v, of = config.vision, body_of(config.vision.body, "hf", biases=(ALL, NO_QKV))
    if v.norm_pre is not None or v.prefix != 2 or v.stem is not None or not v.patch_bias:
        raise UserError("transformers' DeiT cannot hold this tower", "it has two tokens in front and no norm before the blocks")
    return {"architectures": ["DeiTForImageClassificationWithTeacher"], "model_type": "deit", "dtype": "float32", "image_size": v.image_size,
            "patch_size": v.patch, "num_channels": v.channels, "hidden_size": of["width"], "num_hidden_layers": of["depth"],
            "num_attention_heads": of["heads"], "intermediate_size": of["hidden"], "hidden_act": act_name(of["act"], "hf"),
            "layer_norm_eps": of["eps"], "qkv_bias": of["bias"] == ALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            **labels(config.head.out)}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "DeiTImageProcessor")


LAYOUT = Layout(of="deit", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
