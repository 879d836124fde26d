"""VideoMAE as transformers publishes it: VideoMAEForPreTraining and VideoMAEForVideoClassification (MCG-NJU/videomae-base and its like).

Files of the hub keep the biases of queries and values as `q_bias` and `v_bias`; newer ones have them with their linears. Positions are in neither.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, body, hf_feed, single, size, to_hf_feed
from polysense.weights.vit_hf import labels

QV, LAST = "q v out", 1e-5                   # eps of the norms that transformers builds with torch's default


def blocks(at: str) -> KeyMap:
    a = f"{at}.{{i}}.attention.attention"
    return KeyMap((
        *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{a}.{t}", f"blocks.{{i}}.attn.{o}")),
        *both(f"{at}.{{i}}.attention.output.dense", "blocks.{i}.attn.out"),
        *both(f"{at}.{{i}}.layernorm_before", "blocks.{i}.norm1"), *both(f"{at}.{{i}}.layernorm_after", "blocks.{i}.norm2"),
        *both(f"{at}.{{i}}.intermediate.dense", "blocks.{i}.mlp.up"), *both(f"{at}.{{i}}.output.dense", "blocks.{i}.mlp.down"),
    ), alias=((f"{a}.q_bias", f"{a}.query.bias"), (f"{a}.v_bias", f"{a}.value.bias")))


VISION = (KeyMap((*both("embeddings.patch_embeddings.projection", "patch"), *both("layernorm", "body.norm")))
          + blocks("encoder.layer").at("", "body")).at("videomae", "encoder")
DECODER = KeyMap((rule("encoder_to_decoder.weight", "decoder.embed.weight"), rule("mask_token", "decoder.token"),
                  *both("decoder.norm", "decoder.body.norm"), *both("decoder.head", "decoder.head")), own=(r"decoder\.position",)) \
    + blocks("decoder_layers").at("decoder", "decoder.body")


def keymap(config: Any) -> KeyMap:
    """With a decoder the pre-training form, with a head the classifier."""
    if hasattr(config.head, "out"):
        return VISION + KeyMap((*both("fc_norm", "head.norm"), *both("classifier", "head.out")))
    return VISION + DECODER


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`; whether it has a decoder or classes from the state."""
    if config.get("model_type") != "videomae":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'videomae'",
                        "give the folder of a VideoMAEForPreTraining or VideoMAEForVideoClassification")
    if not config.get("qv_bias", True):
        raise UserError("this VideoMAE has no bias of queries and values", "only the published form is read")
    act, eps = config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12)
    image, patch, frames = single(config.get("image_size", 224)), single(config.get("patch_size", 16)), config.get("num_frames", 16)
    classes = size(state, "classifier.weight") if "classifier.weight" in state else 0
    if classes and "fc_norm.weight" not in state:
        raise UserError("this VideoMAE classifies by its first token", "only the mean of all tokens is read (use_mean_pooling)")
    width = config.get("hidden_size", 768)
    out: Dict = {
        "config.encoder.image_size": image, "config.encoder.patch": patch, "config.encoder.frames": frames, "config.target.patch": patch,
        "config.encoder.tubelet": config.get("tubelet_size", 2), "config.target.frames": config.get("tubelet_size", 2), "feed.video.frames": frames,
        "feed.video.view.size": image, **{k: v for k, v in hf_feed(config, image).items() if "train_image" not in k},
        **body("config.encoder.body", width=width, depth=config.get("num_hidden_layers", 12), heads=config.get("num_attention_heads", 12),
               hidden=config.get("intermediate_size", 3072), act=act, eps=eps, final=not classes)}
    if classes:
        return "finetune", out | {"config.head.into": width, "config.head.out": classes, "config.encoder.body.drop_path": 0.0}
    if "videomae.layernorm.weight" not in state:
        out["config.encoder.body.norm"] = None
    return "paper", out | {
        "config.target.norm": "channel" if config.get("norm_pix_loss", True) else "range",
        **body("config.decoder.body", width=config.get("decoder_hidden_size", 384), depth=config.get("decoder_num_hidden_layers", 4),
               heads=config.get("decoder_num_attention_heads", 6), hidden=config.get("decoder_intermediate_size", 1536), act=act, eps=eps,
               final=False)}


def write(config: Any) -> Dict:
    """`config.json` of either form."""
    v, head = config.encoder, hasattr(config.head, "out")
    parts = [v.body] if head else [v.body, config.decoder.body]
    first = parts[0].block
    for b in parts:
        block = b.block
        if isinstance(block, tuple) or block.layer_scale is not None or block.cross is not None or block.attn.bias != QV \
                or block.mlp.bias != "up down" or hasattr(block.mlp, "gate") or (block.norm.eps, block.mlp.act) != (first.norm.eps, first.mlp.act):
            raise UserError("transformers' VideoMAE cannot hold these blocks", "they have biases of queries and values, one eps and one activation")
    if (head and (v.body.norm is not None or config.head.eps != LAST)) or (not head and (config.decoder.body.norm.eps != LAST
                                                                                       or config.decoder.prefix or config.decoder.bias != "head")):
        raise UserError("transformers' VideoMAE has no place for these norms", f"the last norm of its decoder and head has eps {LAST}")
    if not head and v.body.norm is not None and v.body.norm.eps != first.norm.eps:
        raise UserError("transformers' VideoMAE has one eps in its encoder", "keep the run folder")

    def sizes(b: Any, prefix: str = "") -> Dict:
        hidden = b.block.mlp.hidden or int(b.block.mlp.ratio * b.width)
        return {f"{prefix}hidden_size": b.width, f"{prefix}num_hidden_layers": b.depth, f"{prefix}num_attention_heads": b.heads,
                f"{prefix}intermediate_size": hidden}
    return {"architectures": ["VideoMAEForVideoClassification" if head else "VideoMAEForPreTraining"], "model_type": "videomae", "dtype": "float32",
            "image_size": v.image_size, "patch_size": v.patch, "num_channels": v.channels, "num_frames": v.frames, "tubelet_size": v.tubelet,
            **sizes(v.body), **({} if head else sizes(config.decoder.body, "decoder_")), "hidden_act": act_name(first.mlp.act, "hf"),
            "layer_norm_eps": first.norm.eps, "qv_bias": True, "use_mean_pooling": v.body.norm is None,
            "norm_pix_loss": config.target.norm == "channel",
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **(labels(config.head.out) if head else {})}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "VideoMAEImageProcessor")


LAYOUT = Layout(of="videomae", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
