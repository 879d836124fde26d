"""MAE as transformers publishes it: ViTMAEForPreTraining (facebook/vit-mae-base, -large, -huge).

Files of the hub call the decoder's blocks `decoder_layers`; transformers 5 renames all blocks in memory and saves the decoder's under
`decoder_encoder.layer`. All three are read, the first is written.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, NO_QKV, Dict, act_name, body, body_of, hf_feed, single, to_hf_feed
from polysense.weights.vit_hf import IN_MEMORY, VISION

LAYER = "decoder_layers.{i}"

DECODER = KeyMap((
    rule("mask_token", "token"), rule("decoder_pos_embed", "position"), *both("decoder_embed", "embed"), *both("decoder_pred", "head"),
    *both("decoder_norm", "body.norm"),
    *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{LAYER}.attention.attention.{t}", f"body.blocks.{{i}}.attn.{o}")),
    *both(f"{LAYER}.attention.output.dense", "body.blocks.{i}.attn.out"),
    *both(f"{LAYER}.layernorm_before", "body.blocks.{i}.norm1"), *both(f"{LAYER}.layernorm_after", "body.blocks.{i}.norm2"),
    *both(f"{LAYER}.intermediate.dense", "body.blocks.{i}.mlp.up"), *both(f"{LAYER}.output.dense", "body.blocks.{i}.mlp.down"),
), alias=(("decoder_encoder.layer.{i}.{rest}", f"{LAYER}.{{rest}}"),
          *((f"decoder_{a}", b.replace("encoder.layer", "decoder_layers")) for a, b in IN_MEMORY)))


def keymap(config: Any) -> KeyMap:
    return VISION.at("vit", "encoder") + DECODER.at("decoder", "decoder")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`; fields that it leaves out have transformers' defaults."""
    if config.get("model_type") != "vit_mae":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'vit_mae'",
                        "give the folder of a ViTMAEForPreTraining")
    act, eps, image = config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12), single(config.get("image_size", 224))
    bias = ALL if config.get("qkv_bias", True) else NO_QKV
    patch = single(config.get("patch_size", 16))
    return "vit_b_16", {
        "config.encoder.image_size": image, "config.encoder.patch": patch, "config.target.patch": patch,
        "config.encoder.body.block.attn.bias": bias, "config.decoder.body.block.attn.bias": bias,
        "config.sampler.ratio": config.get("mask_ratio", 0.75), "config.target.norm": "patch" if config.get("norm_pix_loss") else "none",
        **body("config.encoder.body", width=config.get("hidden_size", 768), depth=config.get("num_hidden_layers", 12),
               heads=config.get("num_attention_heads", 12), hidden=config.get("intermediate_size", 3072), act=act, eps=eps),
        **body("config.decoder.body", width=config.get("decoder_hidden_size", 512), depth=config.get("decoder_num_hidden_layers", 8),
               heads=config.get("decoder_num_attention_heads", 16), hidden=config.get("decoder_intermediate_size", 2048), act=act, eps=eps),
        **hf_feed(config, image)}


def write(config: Any) -> Dict:
    """`config.json` of a ViTMAEForPreTraining."""
    v, a, b = config.encoder, *(body_of(part.body, "hf", biases=(ALL, NO_QKV)) for part in (config.encoder, config.decoder))
    if not plain(config):
        raise UserError("transformers' ViTMAE cannot hold this encoder or decoder",
                        "it has one class token, fixed positions and no norm before the blocks")
    if (a["act"], a["eps"], a["bias"]) != (b["act"], b["eps"], b["bias"]):
        raise UserError("transformers' ViTMAE has one activation, eps and kind of bias for encoder and decoder", "keep the run folder")
    return {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "dtype": "float32", "image_size": v.image_size, "patch_size": v.patch,
            "num_channels": v.channels, "hidden_size": a["width"], "num_hidden_layers": a["depth"], "num_attention_heads": a["heads"],
            "intermediate_size": a["hidden"], "hidden_act": act_name(a["act"], "hf"), "layer_norm_eps": a["eps"], "qkv_bias": a["bias"] == ALL,
            "decoder_hidden_size": b["width"], "decoder_num_hidden_layers": b["depth"], "decoder_num_attention_heads": b["heads"],
            "decoder_intermediate_size": b["hidden"], "mask_ratio": config.sampler.ratio, "norm_pix_loss": config.target.norm == "patch",
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def plain(config: Any) -> bool:
    """Whether this is the published form of the model."""
    v, d = config.encoder, config.decoder
    return v.prefix == d.prefix == 1 and v.stem is None and v.norm_pre is None and v.position == "sincos" and bool(v.patch_bias) \
        and d.bias == "embed head" and config.target.norm in ("none", "patch")


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "ViTImageProcessor")


LAYOUT = Layout(of="mae", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
