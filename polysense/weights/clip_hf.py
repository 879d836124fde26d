"""CLIP as transformers' CLIPModel publishes it. TEXT and VISION are the bare towers, for systems that stand on one of them."""
from dataclasses import replace
from math import log
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.clip_openai import check_vit, is_vit, text_sizes, vit_sizes
from polysense.weights.keymap import KeyMap, State, both, lead1, lead2, rule, scalar
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, body_of, hf_feed, single, to_hf_feed, within

LEGACY_EOS = 2                                              # written for years in place of the true id; means: the largest id of the text

BODY = KeyMap((
    *(r for t, o in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"))
      for r in both(f"layers.{{i}}.self_attn.{t}", f"blocks.{{i}}.attn.{o}")),
    *both("layers.{i}.layer_norm1", "blocks.{i}.norm1"), *both("layers.{i}.layer_norm2", "blocks.{i}.norm2"),
    *both("layers.{i}.mlp.fc1", "blocks.{i}.mlp.up"), *both("layers.{i}.mlp.fc2", "blocks.{i}.mlp.down"),
))

# a tower alone is saved with the prefix of the whole model by transformers 4, without it by 5
TEXT = KeyMap((
    rule("embeddings.token_embedding.weight", "embed.weight"), rule("embeddings.position_embedding.weight", "position", lead1),
    *both("final_layer_norm", "body.norm"),
), drop=(r"embeddings\.position_ids",), alias=(("text_model.{rest}", "{rest}"),)) + BODY.at("encoder", "body")

VISION = KeyMap((
    rule("embeddings.class_embedding", "cls", lead2), rule("embeddings.position_embedding.weight", "position", lead1),
    rule("embeddings.patch_embedding.weight", "patch.weight"), *both("pre_layrnorm", "norm_pre"), *both("post_layernorm", "body.norm"),
), drop=(r"embeddings\.position_ids",), alias=(("vision_model.{rest}", "{rest}"),)) + BODY.at("encoder", "body")

TEXT_DEFAULTS: Dict = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
                       "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}
VISION_DEFAULTS: Dict = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                         "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def keymap(config: Any) -> KeyMap:
    """The whole of CLIP."""
    if not is_vit(config):
        raise UserError("the layout 'hf' has no name for CLIP's ResNets", "use open_clip or openai")
    return VISION.at("vision_model", "vision") + TEXT.at("text_model", "text") + KeyMap((
        rule("visual_projection.weight", "image_head.weight"), rule("text_projection.weight", "text_head.weight"),
        rule("logit_scale", "log_scale", scalar)))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`; fields that old files leave out have transformers' defaults."""
    if config.get("model_type") != "clip":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'clip'",
                        "give the folder of a CLIPModel")
    text, vision = _merged(config, "text_config", TEXT_DEFAULTS), _merged(config, "vision_config", VISION_DEFAULTS)
    dim, end, image = config.get("projection_dim", 512), text["eos_token_id"], single(vision["image_size"])
    out = text_sizes(text["vocab_size"], text["max_position_embeddings"], dim, **_body(text))
    out |= vit_sizes(image, single(vision["patch_size"]), dim, **_body(vision))
    out |= {"config.text.end": None if end == LEGACY_EOS else end, "feed.text.pad": "end"}
    return "vit_b_32", out | hf_feed(config, image)


def _merged(config: Dict, part: str, defaults: Dict) -> Dict:
    # files of 2021 and 2022 say it twice; transformers lets the second, completed with its defaults, win
    again = within(config, f"{part}_dict")
    return {**defaults, **within(config, part), **({**defaults, **again} if again else {})}


def _body(part: Dict) -> Dict:
    return {"width": part["hidden_size"], "depth": part["num_hidden_layers"], "heads": part["num_attention_heads"],
            "hidden": part["intermediate_size"], "act": part["hidden_act"], "eps": part["layer_norm_eps"]}


def write(config: Any) -> Dict:
    """`config.json` of a CLIPModel."""
    if not is_vit(config):
        raise UserError("transformers' CLIPModel has no ResNet", "export to open_clip or openai")
    check_vit(config, "hf")
    if config.vision.pool != "cls":
        raise UserError("transformers' CLIPModel reads the class token", "export to open_clip")
    t, end = config.text, config.text.end
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": LEGACY_EOS} if end is None else \
        {"bos_token_id": max(end - 1, 0), "pad_token_id": end, "eos_token_id": end}
    if end == LEGACY_EOS:
        raise UserError(f"in transformers an end token of id {LEGACY_EOS} means the largest id of the text", "export to open_clip")
    dim = config.text_head.out
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": dim, "logit_scale_init_value": log(config.scale), "dtype": "float32",
        "text_config": {"model_type": "clip_text_model", "vocab_size": t.vocab, "max_position_embeddings": t.length, "projection_dim": dim, **ids,
                        **sizes_of(body_of(t.body, "hf"))},
        "vision_config": {"model_type": "clip_vision_model", "image_size": config.vision.image_size, "patch_size": config.vision.patch,
                          "projection_dim": dim, **sizes_of(body_of(config.vision.body, "hf"))}}


def sizes_of(of: Dict) -> Dict:
    return {"hidden_size": of["width"], "num_hidden_layers": of["depth"], "num_attention_heads": of["heads"], "intermediate_size": of["hidden"],
            "hidden_act": act_name(of["act"], "hf"), "layer_norm_eps": of["eps"]}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "CLIPImageProcessor")


def layout(of: str, preset: str, own: tuple[str, ...] = (), dim: str = "") -> Layout:
    """The same for another system whose released part is a CLIPModel; `preset` is its own of that form, `own` what the files do not hold, `dim` a
    field of its configuration that repeats the size of the joint space."""
    def read_own(config: Dict, state: State) -> tuple[str, Dict]:
        overrides = read(config, state)[1]
        return preset, overrides | ({dim: overrides["config.image_head.out"]} if dim else {})

    def keymap_own(config: Any) -> KeyMap:
        return keymap(config) + KeyMap((), own=own)
    return replace(LAYOUT, of=of, keymap=keymap_own, read=read_own)


LAYOUT = Layout(of="clip", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
