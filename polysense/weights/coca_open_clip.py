"""CoCa as open_clip saves it: `visual.*` with its attentional poolers, `text.*` with a token behind, `text_decoder.*` of two kinds of blocks."""
from typing import Any, cast

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights import clip_open_clip
from polysense.weights.clip_openai import BODY
from polysense.weights.keymap import KeyMap, State, both, lead1, lead2, rule, same, scalar, stack3, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, image_feed, single, within

ORDERS = {True: "single", "cascade": "cascade", "parallel": "parallel"}
BIAS = (rule("in_proj_bias", ("q.bias", "k.bias", "v.bias"), stack3), *both("out_proj", "out"))
CROSS = KeyMap((rule("in_proj_weight", ("q.weight", "k.weight", "v.weight"), stack3), *BIAS))
APART = KeyMap((*(rule(f"{n}_proj_weight", f"{n}.weight") for n in "qkv"), *BIAS))


def pooler(source: int, width: int) -> KeyMap:
    """torch keeps the three products in one matrix where both sides are equally wide."""
    norms = KeyMap((rule("query", "query"), *both("ln_q", "norm_q"), *both("ln_k", "norm_k")))
    return norms + (CROSS if source == width else APART).at("attn", "attn")


def decoder(depth: int) -> KeyMap:
    """Their two lists of blocks take turns in ours."""
    block = KeyMap(tuple(rule(tuple(n.removeprefix("resblocks.{i}.") for n in r.theirs), tuple(n.removeprefix("blocks.{i}.") for n in r.ours), r.op)
                         for r in BODY.rules))
    read = block + KeyMap(both("ln_1_kv", "norm_source"))
    out = KeyMap(both("ln_final", "norm"), drop=("attn_mask",))
    for i in range(depth):
        out = out + block.at(f"resblocks.{i}", f"blocks.{2 * i}") + read.at(f"cross_attn.{i}", f"blocks.{2 * i + 1}")
    return out


def keymap(config: Any) -> KeyMap:
    v = config.vision
    image = KeyMap((rule("class_embedding", "tower.cls", lead2), rule("positional_embedding", "tower.position", lead1),
                    rule("conv1.weight", "tower.patch.weight"), *both("ln_pre", "tower.norm_pre"),
                    *both("ln_post", "norm" if v.contrast is None else "tower.body.norm"))) \
        + BODY.at("transformer", "tower.body") + pooler(v.tower.width, v.caption.width).at("attn_pool", "caption")
    if v.contrast is not None:
        image = image + pooler(v.tower.width if v.order == "parallel" else v.caption.width, v.contrast.width).at("attn_pool_contrastive", "contrast")
    text = KeyMap((rule("token_embedding.weight", "embed.weight"), rule("positional_embedding", "position", lead1), rule("cls_emb", "cls", same),
                   *both("ln_final", "body.norm")), drop=("attn_mask",)) + BODY.at("transformer", "body")
    heads = KeyMap((rule("visual.proj", "image_head.weight", transpose), rule("text.text_projection", "text_head.weight", transpose),
                    rule("text_decoder.text_projection", "words.weight", transpose), rule("logit_scale", "log_scale", scalar)))
    return heads + image.at("visual", "vision") + text.at("text", "text") + decoder(len(config.decoder.block) // 2).at("text_decoder", "decoder")


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `open_clip_config.json`. UserError for towers of other libraries and for other forms than the released ones."""
    cfg = within(config, "model_cfg") or (config if "multimodal_cfg" in config else {})
    vision, text, multi, dim = within(cfg, "vision_cfg"), within(cfg, "text_cfg"), within(cfg, "multimodal_cfg"), cfg.get("embed_dim")
    if not dim or not multi:
        raise UserError("open_clip_config.json is missing, or not of a CoCa", "put it beside the weights: heads and poolers are not in them")
    order, width = ORDERS.get(vision.get("attentional_pool", False), ""), text.get("width", 512)
    odd = [k for part in (vision, text) for k, plain in clip_open_clip.PLAIN.items() if k not in ("attentional_pool", "embed_cls")
           and part.get(k, plain) != plain]
    if not order or odd or not text.get("embed_cls") or {multi.get("width", 512), width} != {dim} or vision.get("pool_type", "tok") != "tok" \
            or any(part.get("ls_init_value") is not None or part.get("mlp_ratio", 4) != 4 for part in (vision, text, multi)):
        raise UserError(f"this open_clip CoCa has {odd[0] if odd else 'another form than the released ones'}",
                        "read are attentional pools of CLIP's ViT, a token behind the text, and one width for text, decoder and features")
    act, wide, vocab = "quick_gelu" if cfg.get("quick_gelu") else "gelu", vision.get("width", 768), text.get("vocab_size", 49408)
    size, length, patch = single(vision.get("image_size", 224)), text.get("context_length", 77), single(vision.get("patch_size", 16))
    depth, queries, heads = multi.get("layers", 12), vision.get("attn_pooler_queries", 256), vision.get("attn_pooler_heads", 8)
    norm, mlp = {"is": "polysense.nn.norm:LayerNorm.Config"}, {"is": "polysense.nn.mlp:MLP.Config", "act": act}
    blocks = tuple(from_dict({"is": kind, "mlp": mlp}) for kind in ("polysense.nn.block:PreNorm.Config", "polysense.decoders.split:Reading.Config"))
    pool = {"is": "polysense.connectors.attentional_pool:AttentionalPooler.Config", "width": dim, "heads": heads}
    out: Dict = {
        "config.vision.tower.image_size": size, "config.vision.tower.patch": patch, "config.vision.order": order,
        **body("config.vision.tower.body", width=wide, depth=vision.get("layers", 12), heads=wide // vision.get("head_width", 64), hidden=4 * wide,
               act=act),
        "config.vision.tower.body.norm": None if order == "single" else from_dict(norm),
        "config.vision.caption": from_dict(pool | {"queries": queries}),
        "config.vision.contrast": None if order == "single" else from_dict(pool | {"queries": 1}),
        **body("config.text.body", width=width, depth=text.get("layers", 12), heads=text.get("heads", 8), hidden=4 * width, act=act),
        "config.decoder.width": width, "config.decoder.depth": 2 * depth, "config.decoder.heads": multi.get("heads", 8),
        "config.decoder.block": blocks * depth, "config.text.sees": "released",
        "config.text.pad": text.get("pad_id", 0), "config.start": vocab - 2, "config.end": vocab - 1, "config.words.into": width,
        **{f"config.{k}": vocab for k in ("text.vocab", "words.out")}, "config.text.length": length, "feed.text.vocab": vocab,
        "feed.text.length": length, **{f"config.{k}_head.{side}": dim for k in ("image", "text") for side in ("into", "out")}}
    plan = within(config, "preprocess_cfg")
    return "vit_b_32", out | image_feed(size, mean=plan.get("mean"), std=plan.get("std"), resample=plan.get("interpolation", ""))


def write(config: Any) -> Dict:
    """`open_clip_config.json`. UserError for a CoCa that open_clip does not build."""
    v, t, d = config.vision, config.text, config.decoder
    block: Any = d.block
    blocks: list[Any] = [*cast(tuple[Any, ...], block)] if isinstance(block, tuple) else []
    tower = body_of(v.tower.body, "open_clip")
    text, dim = body_of(t.body, "open_clip"), v.caption.width
    acts: set[str] = {tower["act"], *(b.mlp.act for b in blocks)}
    apart = [b for i, b in enumerate(blocks) if hasattr(b, "cross") == bool(i % 2) or getattr(b, "cross", None)]
    if not blocks or apart or acts | {text["act"]} != {text["act"]} or text["act"] not in ("gelu", "quick_gelu") or v.tower.norm_pre is None \
            or v.tower.patch_bias or {d.width, t.body.width} != {dim} or tower["eps"] != 1e-5 or text["eps"] != 1e-5 \
            or any(b["hidden"] != 4 * b["width"] for b in (tower, text)) or tower["width"] % tower["heads"] \
            or (v.contrast is not None and tower["width"] != dim) or t.sees != "released":
        raise UserError("open_clip's CoCa has CLIP's ViT, blocks that read the picture between others, one width and activation, its own mask",
                        "keep the run folder, or train a preset of that form (vit_b_32)")
    return {"model_cfg": {
        "embed_dim": dim, "quick_gelu": text["act"] == "quick_gelu", "custom_text": True,
        "vision_cfg": {"image_size": v.tower.image_size, "patch_size": v.tower.patch, "width": tower["width"], "layers": tower["depth"],
                       "head_width": tower["width"] // tower["heads"], "attentional_pool": {o: k for k, o in ORDERS.items()}[v.order],
                       "attn_pooler_heads": v.caption.heads, "attn_pooler_queries": v.caption.queries, "output_tokens": True},
        "text_cfg": {"context_length": t.length, "vocab_size": t.vocab, "width": text["width"], "heads": text["heads"], "layers": text["depth"],
                     "embed_cls": True, "output_tokens": True, "pad_id": t.pad},
        "multimodal_cfg": {"context_length": t.length, "vocab_size": t.vocab, "width": d.width, "heads": d.heads, "layers": len(blocks) // 2}}}


LAYOUT = Layout(of="coca", name="open_clip", keymap=keymap, read=read, write=write, feed=clip_open_clip.feed, config_file="open_clip_config.json",
                weights_file="open_clip_model.safetensors")
