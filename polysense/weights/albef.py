"""ALBEF as released (salesforce/ALBEF): `ALBEF.pth`, one state with the momentum copy and the queues, beside it `config_bert.json`.

The ViT has timm's names. The BERT is one BertForMaskedLM; its layers from `fusion_layer` on have a cross-attention and are our fusion encoder.
"""
from typing import Any

import torch

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Op, Rule, State, both, lead1, rule, scalar, tied, transpose
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, body, body_of, count, image_feed, side, single, size
from polysense.weights.vit_timm import VISION

# their one pointer is that of both queues; a released model has its first epoch behind it
pointers = Op("pointers", lambda t: [t[0].reshape(()), t[0].reshape(()), torch.ones(())], lambda t: [t[0].reshape(1)])
HEAD_WIDTH = 64                                              # of the ViT and, where config_bert.json is missing, of the BERT


def attention(theirs: str, ours: str, norm: str) -> tuple[Rule, ...]:
    """A BertAttention with the norm behind it."""
    return (*(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{theirs}.self.{t}", f"{ours}.{o}")),
            *both(f"{theirs}.output.dense", f"{ours}.out"), *both(f"{theirs}.output.LayerNorm", norm))


def layer(theirs: str, ours: str, cross: str = "crossattention") -> tuple[Rule, ...]:
    """A BertLayer; `cross` is their name of the cross-attention (none in blocks without)."""
    return (*attention(f"{theirs}.attention", f"{ours}.attn", f"{ours}.norm1"),
            *(attention(f"{theirs}.{cross}", f"{ours}.cross", f"{ours}.norm_cross") if cross else ()),
            *both(f"{theirs}.intermediate.dense", f"{ours}.mlp.up"), *both(f"{theirs}.output.dense", f"{ours}.mlp.down"),
            *both(f"{theirs}.output.LayerNorm", f"{ours}.norm2"))


def network(config: Any, twin: str, ours: str) -> KeyMap:
    """The network, or (twin="_m") its momentum copy. In theirs the word embeddings also stand as the decoder of the word head, its bias twice."""
    words, first = f"text_encoder{twin}.bert", config.text.body.depth
    head, place = f"text_encoder{twin}.cls.predictions", f"{ours}words"
    return VISION.at(f"visual_encoder{twin}", f"{ours}vision") + KeyMap((
        *both(f"vision_proj{twin}", f"{ours}image_head"), *both(f"text_proj{twin}", f"{ours}text_head"),
        rule((f"{words}.embeddings.word_embeddings.weight", f"{head}.decoder.weight"), f"{ours}text.embed.weight", tied),
        rule(f"{words}.embeddings.position_embeddings.weight", f"{ours}text.position", lead1),
        rule(f"{words}.embeddings.token_type_embeddings.weight", f"{ours}text.kind.weight"),
        *both(f"{words}.embeddings.LayerNorm", f"{ours}text.norm_pre"),
        *(r for i in range(first) for r in layer(f"{words}.encoder.layer.{i}", f"{ours}text.body.blocks.{i}", "")),
        *(r for i in range(config.fusion.depth) for r in layer(f"{words}.encoder.layer.{first + i}", f"{ours}fusion.blocks.{i}")),
        *both(f"{head}.transform.dense", f"{place}.pre"), *both(f"{head}.transform.LayerNorm", f"{place}.norm"),
        rule((f"{head}.bias", f"{head}.decoder.bias"), f"{place}.bias", tied),
    ), drop=(rf"text_encoder{twin}\.bert\.embeddings\.position_ids",))


def keymap(config: Any) -> KeyMap:
    """The whole of the pre-trained model; of a retrieval model also (its `idx_queue` is dropped)."""
    if config.answer is not None:
        raise UserError("the released pre-training file has no answer decoder", "use the preset captions or paper, or keep the run folder")
    return network(config, "", "") + network(config, "_m", "teacher.module.") + KeyMap((
        rule("temp", "temperature", scalar), *both("itm_head", "match_head"),
        rule("image_queue", "image_queue.keys", transpose), rule("text_queue", "text_queue.keys", transpose),
        rule("queue_ptr", ("image_queue.pointer", "text_queue.pointer", "ramp"), pointers)), drop=("idx_queue",))


def towers(config: Dict, state: State, at: str) -> Dict:
    """Overrides for the ViT and the two halves of the BERT whose names begin with `at`: sizes from the shapes, heads from config_bert.json or
    the head width that all released models share."""
    body_at = f"{at}.encoder"
    width, wide = size(state, f"{at}.embeddings.word_embeddings.weight", 1), size(state, "visual_encoder.patch_embed.proj.weight")
    depth = count(state, f"{body_at}.layer")
    first = next((i for i in range(depth) if f"{body_at}.layer.{i}.crossattention.self.query.weight" in state), depth)
    heads, eps, act = config.get("num_attention_heads", width // HEAD_WIDTH), config.get("layer_norm_eps", 1e-12), config.get("hidden_act", "gelu")
    if not 0 < first < depth:
        raise UserError("this BERT has not first layers without, then layers with cross-attention", "give ALBEF's pre-trained or retrieval model")
    patch, hidden = size(state, "visual_encoder.patch_embed.proj.weight", 3), size(state, f"{body_at}.layer.0.intermediate.dense.weight")
    image = patch * side(size(state, "visual_encoder.pos_embed", 1))
    part: Dict = {"width": width, "heads": heads, "hidden": hidden, "act": act, "eps": eps, "final": False}
    vocab, length = (size(state, f"{at}.embeddings.{n}_embeddings.weight") for n in ("word", "position"))
    return {
        **body("config.vision.body", width=wide, depth=count(state, "visual_encoder.blocks"), heads=max(1, wide // HEAD_WIDTH),
               hidden=size(state, "visual_encoder.blocks.0.mlp.fc1.weight"), act="gelu", eps=1e-6),
        "config.vision.image_size": image, "config.vision.patch": patch, **body("config.text.body", depth=first, **part),
        **body("config.fusion", depth=depth - first, **part), "config.fusion.block.cross.source": wide,
        "config.text.vocab": vocab, "config.text.length": length, "config.text.norm_pre.eps": eps, "config.text.pad": config.get("pad_token_id", 0),
        "config.text.kinds": size(state, f"{at}.embeddings.token_type_embeddings.weight"),
        "config.hide.vocab": vocab, "feed.text.vocab": vocab, "feed.text.length": min(30, length), **image_feed(image)}


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) of the pre-trained or a retrieval model."""
    out = towers(config, state, "text_encoder.bert")
    wide, width, vocab = out["config.vision.body.width"], out["config.text.body.width"], out["config.text.vocab"]
    dim, act, eps = size(state, "image_queue"), config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12)
    return "paper", out | {
        "config.words.act": act, "config.words.norm.eps": eps, "config.words.vocab": vocab, "config.queue.size": size(state, "image_queue", 1),
        "config.queue.width": dim, "config.image_head.into": wide, "config.image_head.out": dim, "config.text_head.into": width,
        "config.text_head.out": dim, "config.match_head.into": width}


def write(config: Any) -> Dict:
    """`config_bert.json`. UserError for a tower that has no names in the released files."""
    v = config.vision
    if not hasattr(v, "patch") or v.prefix != 1 or v.norm_pre is not None or v.stem is not None or v.body.heads != max(1, v.width // HEAD_WIDTH):
        raise UserError("the released layout holds a plain ViT with heads of width 64", "keep the run folder")
    eye, text = body_of(v.body, "albef"), body_of(config.text.body, "albef")
    if eye["act"] != "gelu" or eye["eps"] != 1e-6:
        raise UserError(f"ALBEF's ViT has GELU and eps 1e-6, this one {eye['act']} and {eye['eps']}", "keep the run folder")
    return {"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": config.text.vocab, "pad_token_id": config.text.pad,
            "hidden_size": text["width"], "num_hidden_layers": text["depth"] + config.fusion.depth, "num_attention_heads": text["heads"],
            "intermediate_size": text["hidden"], "hidden_act": act_name(text["act"], "albef"), "layer_norm_eps": text["eps"],
            "max_position_embeddings": config.text.length, "type_vocab_size": config.text.kinds, "fusion_layer": text["depth"],
            "encoder_width": v.width, "hidden_dropout_prob": config.text.dropout, "image_size": single(v.image_size)}


LAYOUT = Layout(of="albef", name="albef", keymap=keymap, read=read, write=write, config_file="config_bert.json", weights_file="ALBEF.pth")
