"""BLIP-2's first stage as released (salesforce/LAVIS): `blip2_pretrained.pth`, the whole Q-Former with its word predictor and the three heads.

LAVIS saves what it trained; where the file has no image tower, `eva_vit_g.pth` beside it is read, of whose forty blocks the last is not used.
"""
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.weights.albef import attention
from polysense.weights.keymap import KeyMap, Op, State, both, lead1, rule, scalar, stack3, tied
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, Dict, body, body_of, count, image_feed, side, single, size

# EVA has no bias of keys: it adds one number to all scores of a query, which no softmax sees. So a file loses nothing by leaving ours out.
no_key_bias = Op("no_key_bias", lambda t: [t[0], torch.zeros_like(t[0]), t[1]], lambda t: [t[0], t[2]])
EYE_HEAD, WORD_HEAD = 88, 64                                 # widths of a head of EVA's ViT-g and of BERT, which no shape tells
EYE, BERT, WORDS = "visual_encoder", "Qformer.bert", "Qformer.cls.predictions"
BLOCK, OURS = "blocks.{i}", "body.blocks.{i}"

VISION = KeyMap((
    rule("cls_token", "cls"), rule("pos_embed", "position"), *both("patch_embed.proj", "patch"),
    rule(f"{BLOCK}.attn.qkv.weight", tuple(f"{OURS}.attn.{n}.weight" for n in "qkv"), stack3),
    rule((f"{BLOCK}.attn.q_bias", f"{BLOCK}.attn.v_bias"), tuple(f"{OURS}.attn.{n}.bias" for n in "qkv"), no_key_bias),
    *both(f"{BLOCK}.attn.proj", f"{OURS}.attn.out"), *(r for n in (1, 2) for r in both(f"{BLOCK}.norm{n}", f"{OURS}.norm{n}")),
    *both(f"{BLOCK}.mlp.fc1", f"{OURS}.mlp.up"), *both(f"{BLOCK}.mlp.fc2", f"{OURS}.mlp.down")))

LAYER, HERE = f"{BERT}.encoder.layer.{{i}}", "qformer.blocks.{i}"
QFORMER = KeyMap((
    rule("query_tokens", "qformer.query"), *both("ln_vision", "norm_vision"), rule("temp", "temperature", scalar),
    rule((f"{BERT}.embeddings.word_embeddings.weight", f"{WORDS}.decoder.weight"), "qformer.embed.weight", tied),
    rule(f"{BERT}.embeddings.position_embeddings.weight", "qformer.position", lead1), *both(f"{BERT}.embeddings.LayerNorm", "qformer.norm_pre"),
    *attention(f"{LAYER}.attention", f"{HERE}.attn", f"{HERE}.norm1"), *attention(f"{LAYER}.crossattention", f"{HERE}.cross", f"{HERE}.norm_cross"),
    *(r for t, mlp, norm in (("", "mlp", "norm2"), ("_query", "mlp_query", "norm_query"))
      for r in (*both(f"{LAYER}.intermediate{t}.dense", f"{HERE}.{mlp}.up"), *both(f"{LAYER}.output{t}.dense", f"{HERE}.{mlp}.down"),
                *both(f"{LAYER}.output{t}.LayerNorm", f"{HERE}.{norm}"))),
    *both(f"{WORDS}.transform.dense", "align_heads.words.pre"), *both(f"{WORDS}.transform.LayerNorm", "align_heads.words.norm"),
    rule((f"{WORDS}.bias", f"{WORDS}.decoder.bias"), "align_heads.words.bias", tied), *both("vision_proj", "align_heads.image_head"),
    *both("text_proj", "align_heads.text_head"), *both("itm_head", "align_heads.match_head")), drop=(r"Qformer\.bert\.embeddings\.position_ids",))


def keymap(config: Any) -> KeyMap:
    """Of a model of the first stage, with its image tower."""
    if config.language is not None or config.words is None:
        raise UserError("the released file of the first stage has a word predictor and no language model", "export a model of preset paper's form")
    depth = config.vision.body.depth
    return VISION.at(EYE, "vision") + QFORMER + KeyMap((), drop=(rf"{EYE}\.blocks\.{depth}\..*", rf"{EYE}\.(norm|fc_norm|head)\..*"))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides): sizes from the shapes."""
    if f"{EYE}.cls_token" not in state:
        raise UserError("the file holds no image tower: LAVIS saves what it trained", "put eva_vit_g.pth beside it")
    blocks = count(state, f"{EYE}.blocks")
    whole = blocks == 40 or any(f"{EYE}.{n}.weight" in state for n in ("norm", "fc_norm", "head"))        # a tower as EVA-CLIP published it
    wide, patch = size(state, f"{EYE}.patch_embed.proj.weight"), size(state, f"{EYE}.patch_embed.proj.weight", 3)
    width, depth = size(state, "query_tokens", 2), count(state, f"{BERT}.encoder.layer")
    looks = [i for i in range(depth) if f"{BERT}.encoder.layer.{i}.crossattention.self.query.weight" in state]
    vocab, length = (size(state, f"{BERT}.embeddings.{n}_embeddings.weight") for n in ("word", "position"))
    image = patch * side(size(state, f"{EYE}.pos_embed", 1))
    return "paper", {
        **body("config.vision.body", width=wide, depth=blocks - whole, heads=max(1, wide // EYE_HEAD),
               hidden=size(state, f"{EYE}.blocks.0.mlp.fc1.weight"), final=False),
        "config.vision.image_size": image, "config.vision.patch": patch, "config.qformer.queries": size(state, "query_tokens", 1),
        "config.qformer.width": width, "config.qformer.depth": depth, "config.qformer.heads": max(1, width // WORD_HEAD),
        "config.qformer.source": wide, "config.qformer.every": looks[1] if len(looks) > 1 else max(1, depth), "config.qformer.vocab": vocab,
        "config.qformer.length": length, "config.qformer.mlp.hidden": size(state, f"{BERT}.encoder.layer.0.intermediate.dense.weight"),
        "config.words.vocab": vocab, "config.decode": vocab - 1, "config.dim": size(state, "text_proj.weight"),
        "feed.text.vocab": vocab - 1, "feed.text.length": min(32, length), **image_feed(image)}


def write(config: Any) -> Dict:
    """Nothing: the file has no configuration. UserError for a tower or a Q-Former that the released form cannot hold."""
    keymap(config)
    v, of, q = config.vision, body_of(config.vision.body, "lavis", biases=(ALL,)), config.qformer
    if v.prefix != 1 or v.norm_pre is not None or v.stem is not None or config.layer != -1 or of["eps"] != 1e-6 or single(v.image_size) % v.patch:
        raise UserError("LAVIS has the plain EVA tower with eps 1e-6, all of whose blocks are read", "keep the run folder")
    if of["heads"] != max(1, of["width"] // EYE_HEAD) or q.heads != max(1, q.width // WORD_HEAD) or config.decode != q.vocab - 1:
        raise UserError(f"LAVIS has heads of {EYE_HEAD} and {WORD_HEAD} and [DEC] as its last word", "keep the run folder")
    return {}


LAYOUT = Layout(of="blip2", name="lavis", keymap=keymap, read=read, write=write, config_file="", weights_file="blip2_pretrained.pth",
                also=(("eva_vit_g.pth", EYE),))
