"""CLIP as open_clip saves it: OpenAI's names, `open_clip_config.json`, layer scale where used.

Both text layouts are read: plain, and below `text.` (CustomTextCLIP); the plain one is written.
"""
from dataclasses import replace
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights import clip_openai as openai
from polysense.weights.keymap import KeyMap, State, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body_of, image_feed, single, within

SCALES = KeyMap(tuple(rule(f"resblocks.{{i}}.ls_{n}.gamma", f"blocks.{{i}}.scale{n}") for n in (1, 2)))
PLAIN: Dict = {"no_ln_pre": False, "attentional_pool": False, "final_ln_after_pool": False, "pos_embed_type": "learnable", "qk_norm": False,
               "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False, "scale_attn": False, "scale_fc": False,
               "no_causal_mask": False, "embed_cls": False, "proj_bias": False, "proj_type": "linear", "timm_model_name": None, "hf_model_name": None}


def keymap(config: Any) -> KeyMap:
    """OpenAI's table, with layer scale and the other place of the text tower."""
    out = openai.keymap(config) + SCALES.at("transformer", "text.body") + KeyMap((), alias=(("text.{rest}", "{rest}"),))
    return out + SCALES.at("visual.transformer", "vision.body") if openai.is_vit(config) else out


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `open_clip_config.json`. Raises UserError for towers of other libraries and for variants that CLIP has not."""
    cfg = within(config, "model_cfg") or (config if "embed_dim" in config else {})
    if not cfg:
        raise UserError("open_clip_config.json is missing", "put it beside the weights: the activation and the heads are not in them")
    vision, text, dim = within(cfg, "vision_cfg"), within(cfg, "text_cfg"), cfg["embed_dim"]
    for part in (vision, text):
        if odd := [k for k, plain in PLAIN.items() if part.get(k, plain) != plain]:
            raise UserError(f"this open_clip model has {odd[0]}={part[odd[0]]!r}", "only CLIP's own ViT, ResNet and text towers are read")
    act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    width, vocab, length = text.get("width", 512), text.get("vocab_size", 49408), text.get("context_length", 77)
    out = openai.text_sizes(vocab, length, dim, width=width, depth=text.get("layers", 12), heads=text.get("heads", 8),
                            hidden=int(width * text.get("mlp_ratio", 4.0)), act=act, eps=within(text, "norm_kwargs").get("eps", 1e-5))
    out["config.text.body.block.layer_scale"] = text.get("ls_init_value")
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        raise UserError(f"this open_clip text tower pools by {pool!r}", "only 'argmax' and 'eos' are read")
    out["config.text.end"] = text.get("eos_id", 2) if pool == "eos" else None
    image, base = single(vision.get("image_size", 224)), vision.get("width", 768)
    if isinstance(vision.get("layers", 12), (list, tuple)):
        out |= openai.resnet_sizes(image, tuple(vision["layers"]), base, base * 32 // vision.get("head_width", 64), dim)
        return "rn50", out | _feed(config, image)
    if (pooled := vision.get("pool_type", "tok")) not in ("tok", "avg"):
        raise UserError(f"this open_clip image tower pools by {pooled!r}", "only 'tok' and 'avg' are read")
    out |= openai.vit_sizes(image, single(vision.get("patch_size", 16)), dim, width=base, depth=vision.get("layers", 12),
                            heads=base // vision.get("head_width", 64), hidden=int(base * vision.get("mlp_ratio", 4.0)), act=act,
                            eps=within(vision, "norm_kwargs").get("eps", 1e-5))
    out |= {"config.vision.body.block.layer_scale": vision.get("ls_init_value"), "config.vision.pool": "cls" if pooled == "tok" else "mean"}
    return "vit_b_32", out | _feed(config, image)


def _feed(config: Dict, image: int) -> Dict:
    plan = within(config, "preprocess_cfg")
    fit = {"shortest": "crop", "squash": "squash"}.get(plan.get("resize_mode", "shortest"))
    if fit is None:
        raise UserError(f"pictures resized by {plan['resize_mode']!r} are not read here", "known are shortest and squash")
    return image_feed(image, mean=plan.get("mean"), std=plan.get("std"), resample=plan.get("interpolation", ""), fit=fit)


def write(config: Any) -> Dict:
    """`open_clip_config.json`."""
    text, t = body_of(config.text.body, "open_clip", scales="some"), config.text
    acts = {text["act"]}
    text_cfg: Dict = {"context_length": t.length, "vocab_size": t.vocab, "width": text["width"], "heads": text["heads"], "layers": text["depth"],
                      "mlp_ratio": text["hidden"] / text["width"], "norm_kwargs": {"eps": text["eps"]}, "ls_init_value": t.body.block.layer_scale,
                      **({"pool_type": "argmax"} if t.end is None else {"pool_type": "eos", "eos_id": t.end})}
    if openai.is_vit(config):
        openai.check_vit(config, "open_clip")
        v, b = config.vision, body_of(config.vision.body, "open_clip", scales="some")
        if b["width"] % b["heads"] or v.pool not in ("cls", "mean"):
            raise UserError("open_clip has no name for this ViT's pooling or heads", "pool by the class token or the mean")
        acts.add(b["act"])
        vision_cfg: Dict = {"image_size": v.image_size, "patch_size": v.patch, "width": b["width"], "layers": b["depth"],
                            "head_width": b["width"] // b["heads"], "mlp_ratio": b["hidden"] / b["width"], "norm_kwargs": {"eps": b["eps"]},
                            "ls_init_value": v.body.block.layer_scale, "pool_type": "tok" if v.pool == "cls" else "avg"}
    else:
        v = config.vision
        vision_cfg = {"image_size": v.image_size, "layers": list(v.layers), "width": v.base, "head_width": v.base * 32 // v.heads}
    if len(acts) != 1 or acts - {"gelu", "quick_gelu"}:
        raise UserError(f"open_clip has one activation, GELU or QuickGELU, for both towers, not {', '.join(sorted(acts))}", "keep the run folder")
    dim = config.text_head.out
    return {"model_cfg": {"embed_dim": dim, "quick_gelu": acts == {"quick_gelu"}, "vision_cfg": vision_cfg, "text_cfg": text_cfg}}


def feed(of: Feed) -> Dict:
    """`preprocess_cfg`."""
    plan = of.image
    return {} if plan is None else {"preprocess_cfg": {
        "size": plan.size, "mode": "RGB", "mean": list(plan.mean), "std": list(plan.std), "interpolation": plan.resample,
        "resize_mode": "shortest" if plan.fit == "crop" else "squash"}}


def layout(of: str, preset: str) -> Layout:
    """The same for another system that is CLIP's ViT form once trained; `preset` is its own of that form."""
    def read_vit(config: Dict, state: State) -> tuple[str, Dict]:
        name, overrides = read(config, state)
        if name == "rn50":
            raise UserError(f"this file has a ResNet tower, {of} has a ViT", "open it as clip")
        return preset, overrides
    return replace(LAYOUT, of=of, read=read_vit)


LAYOUT = Layout(of="clip", name="open_clip", keymap=keymap, read=read, write=write, feed=feed, config_file="open_clip_config.json",
                weights_file="open_clip_model.safetensors")
