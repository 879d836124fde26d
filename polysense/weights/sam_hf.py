"""SAM as transformers' SamModel publishes it (facebook/sam-vit-base, -large, -huge)."""
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights.keymap import KeyMap, Op, State, both, lead1, rule, split, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, image_feed, single, within

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
piled = Op("piled", lambda t: [torch.stack(t)], lambda t: list(t[0].unbind(0)))          # n of theirs are the n layers of one of ours
bare = Op("bare", lambda t: [t[0].reshape(t[0].shape[1:])], lambda t: [t[0][None]])      # [1,D] -> [D]


def attention(theirs: str, ours: str) -> tuple[Any, ...]:
    """The four linears of an attention of the mask decoder, the same in both layouts."""
    return tuple(r for t, o in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out")) for r in both(f"{theirs}.{t}", f"{ours}.{o}"))


def blocks(theirs: str, norm: str) -> tuple[Any, ...]:
    """The blocks of the image encoder; `norm` is what their norms are called before the number."""
    at, to = f"{theirs}.{{i}}", "vision.blocks.{i}"
    return (*(rule(f"{at}.attn.qkv.{p}", tuple(f"{to}.attn.{n}.{p}" for n in "qkv"), stack3) for p in ("weight", "bias")),
            *both(f"{at}.attn.proj", f"{to}.attn.out"), rule(f"{at}.attn.rel_pos_h", f"{to}.attn.rows"),
            rule(f"{at}.attn.rel_pos_w", f"{to}.attn.columns"),
            *(r for n in (1, 2) for r in both(f"{at}.{norm}{n}", f"{to}.norm{n}")),
            *both(f"{at}.mlp.lin1", f"{to}.mlp.up"), *both(f"{at}.mlp.lin2", f"{to}.mlp.down"))


def copies(names: list[list[str]]) -> tuple[Any, ...]:
    """names[layer][copy] of theirs -> `decoder.kernels.layers.{layer}`."""
    return tuple(rule(tuple(f"{n}.{p}" for n in layer), f"decoder.kernels.layers.{i}.{p}", piled)
                 for i, layer in enumerate(names) for p in ("weight", "bias"))


def keymap(config: Any) -> KeyMap:
    """SAM without words."""
    check(config)
    decoder, mlps = "mask_decoder", "mask_decoder.output_hypernetworks_mlps"
    block, ours, depth = "mask_decoder.transformer.layers.{i}", "decoder.blocks.{i}", config.decoder.judge_depth
    kernel = ["proj_in", "layers.0", "proj_out"]
    judge = {0: "proj_in", depth - 1: "proj_out"} | {i: f"layers.{i - 1}" for i in range(1, depth - 1)}
    return KeyMap((
        rule("vision_encoder.pos_embed", "vision.position"), *both("vision_encoder.patch_embed.projection", "vision.patch"),
        *blocks("vision_encoder.layers", "layer_norm"),
        *(r for n in (1, 2) for r in (rule(f"vision_encoder.neck.conv{n}.weight", f"vision.neck.conv{n}.weight"),
                                      *both(f"vision_encoder.neck.layer_norm{n}", f"vision.neck.norm{n}"))),
        rule("shared_image_embedding.positional_embedding", "prompt.frequencies"),
        rule(("prompt_encoder.not_a_point_embed.weight", *(f"prompt_encoder.point_embed.{i}.weight" for i in range(4))), "prompt.kinds", split(5)),
        rule("prompt_encoder.no_mask_embed.weight", "prompt.no_mask", bare),
        *(r for n in (1, 2, 3) for r in both(f"prompt_encoder.mask_embed.conv{n}", f"prompt.mask.conv{n}")),
        *(r for n in (1, 2) for r in both(f"prompt_encoder.mask_embed.layer_norm{n}", f"prompt.mask.norm{n}")),
        rule(f"{decoder}.iou_token.weight", "decoder.iou_token"), rule(f"{decoder}.mask_tokens.weight", "decoder.mask_tokens"),
        *attention(f"{block}.self_attn", f"{ours}.own"), *attention(f"{block}.cross_attn_token_to_image", f"{ours}.to_image"),
        *attention(f"{block}.cross_attn_image_to_token", f"{ours}.to_tokens"),
        *(r for n in (1, 2, 3, 4) for r in both(f"{block}.layer_norm{n}", f"{ours}.norm{n}")),
        *both(f"{block}.mlp.lin1", f"{ours}.mlp.up"), *both(f"{block}.mlp.lin2", f"{ours}.mlp.down"),
        *attention(f"{decoder}.transformer.final_attn_token_to_image", "decoder.last"),
        *both(f"{decoder}.transformer.layer_norm_final_attn", "decoder.norm"),
        *both(f"{decoder}.upscale_conv1", "decoder.upscale.conv1"), *both(f"{decoder}.upscale_conv2", "decoder.upscale.conv2"),
        *both(f"{decoder}.upscale_layer_norm", "decoder.upscale.norm"),
        *copies([[f"{mlps}.{m}.{name}" for m in range(1 + config.decoder.candidates)] for name in kernel]),
        *(rule(f"{decoder}.iou_prediction_head.{name}.{p}", f"decoder.judge.layers.{i}.{p}", lead1)
          for i, name in judge.items() for p in ("weight", "bias")),
    ), drop=(r"prompt_encoder\.shared_embedding\.positional_embedding",))


def check(config: Any) -> None:
    """Raises UserError for a SAM that the published layouts cannot hold."""
    if config.clip is not None or config.prompt.words:
        raise UserError("the published layouts of SAM hold no words", "export a SAM that was trained without them, or keep the run folder")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`; what old files leave out has transformers' defaults."""
    if config.get("model_type") != "sam":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'sam'",
                        "give the folder of a SamModel")
    v, p, d = (within(config, f"{part}_config") for part in ("vision", "prompt_encoder", "mask_decoder"))
    width, heads, acts = v.get("hidden_size", 768), v.get("num_attention_heads", 12), (v.get("hidden_act", "gelu"), d.get("hidden_act", "relu"))
    if acts != ("gelu", "relu") or not v.get("qkv_bias", True) or not v.get("use_rel_pos", True) or d.get("attention_downsample_rate", 2) != 2:
        raise UserError("this SamModel differs from the released ones (activations, biases, relative positions or halved attention)",
                        "only the released form is read")
    size = single(v.get("image_size", 1024))
    out: Dict = {
        "config.vision.image_size": size, "config.vision.patch": single(v.get("patch_size", 16)), "config.vision.body": width,
        "config.vision.depth": v.get("num_hidden_layers", 12), "config.vision.heads": heads,
        "config.vision.hidden": v.get("mlp_dim") or int(width * v.get("mlp_ratio", 4.0)), "config.vision.window": v.get("window_size", 14),
        "config.vision.whole": tuple(v.get("global_attn_indexes", (2, 5, 8, 11))), "config.vision.width": v.get("output_channels", 256),
        "config.vision.eps": v.get("layer_norm_eps", 1e-6), "config.prompt.width": p.get("hidden_size", 256), "config.prompt.image_size": size,
        "config.prompt.mask_width": p.get("mask_input_channels", 16), "config.decoder.width": d.get("hidden_size", 256),
        "config.decoder.heads": d.get("num_attention_heads", 8), "config.decoder.depth": d.get("num_hidden_layers", 2),
        "config.decoder.hidden": d.get("mlp_dim", 2048), "config.decoder.candidates": d.get("num_multimask_outputs", 3),
        "config.decoder.judge": d.get("iou_head_hidden_dim", 256), "config.decoder.judge_depth": d.get("iou_head_depth", 3),
        "config.decoder.eps": d.get("layer_norm_eps", 1e-6)}
    plan = within(config, "preprocessor_config")
    feed = image_feed(size, mean=plan.get("image_mean", MEAN), std=plan.get("image_std", STD), resample="bilinear", fit="corner")
    return "vit_b", out | {k: value for k, value in feed.items() if not k.startswith("feed.train_image")}


def write(config: Any) -> Dict:
    """`config.json` of a SamModel."""
    check(config)
    v, p, d = config.vision, config.prompt, config.decoder
    return {"architectures": ["SamModel"], "model_type": "sam", "dtype": "float32", "vision_config": {
        "model_type": "sam_vision_model", "hidden_size": v.body, "output_channels": v.width, "num_hidden_layers": v.depth,
        "num_attention_heads": v.heads, "image_size": v.image_size, "patch_size": v.patch, "layer_norm_eps": v.eps, "window_size": v.window,
        "global_attn_indexes": list(v.whole), "num_pos_feats": p.width // 2, "mlp_dim": v.hidden or 4 * v.body,
        "mlp_ratio": (v.hidden or 4 * v.body) / v.body}, "prompt_encoder_config": {
            "model_type": "sam_prompt_encoder", "hidden_size": p.width, "image_size": p.image_size, "patch_size": v.patch,
            "mask_input_channels": p.mask_width}, "mask_decoder_config": {
        "model_type": "sam_mask_decoder", "hidden_size": d.width, "mlp_dim": d.hidden, "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads, "num_multimask_outputs": d.candidates, "iou_head_depth": d.judge_depth, "iou_head_hidden_dim": d.judge,
        "layer_norm_eps": d.eps}}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    plan = of.image
    return {} if plan is None else {"preprocessor_config": {
        "image_processor_type": "SamImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": True,
        "do_convert_rgb": True, "rescale_factor": 1 / 255, "image_mean": list(plan.mean), "image_std": list(plan.std), "resample": 2,
        "size": {"longest_edge": plan.size}, "pad_size": {"height": plan.size, "width": plan.size},
        "mask_size": {"longest_edge": 256}, "mask_pad_size": {"height": 256, "width": 256}}}


LAYOUT = Layout(of="sam", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
