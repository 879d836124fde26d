"""LiT as Google released it (.npz): ViT under `img`, flaxformer's BERT under `txt`, the logarithm of the temperature as `t`.

A head on the image tower is there or not (LiT-B16B has one). Released texts have no end token behind them, those of our tokenizers have.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.declip_official import one
from polysense.weights.keymap import KeyMap, State, lead1, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, count_named, size
from polysense.weights.vit_jax import ACT, checked, dense, norm, tower, vision

HEAD, EPS = 64, 1e-12
BERT = "BertEncoder_0"
LAYER = f"{BERT}.encoder_block.layer_sequence.layers_{{i}}"
TABLES = (("token", "embed.weight"), ("segment", "kind.weight"))

TEXT = KeyMap((
    *(rule(f"{BERT}.embedder.embedders_{t}_ids.embedding", o) for t, o in TABLES),
    rule(f"{BERT}.embedder.embedders_position_ids.embedding", "position", lead1), *norm(f"{BERT}.layer_norm", "norm_pre"),
    *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v"))
      for r in dense(f"{LAYER}.attention_block.attention_layer.{t}", f"body.blocks.{{i}}.attn.{o}")),
    *dense(f"{LAYER}.attention_block.dense_layer", "body.blocks.{i}.attn.out"), *norm(f"{LAYER}.attention_block.layer_norm", "body.blocks.{i}.norm1"),
    *dense(f"{LAYER}.mlp_block.mlp.dense_layer", "body.blocks.{i}.mlp.up"), *dense(f"{LAYER}.mlp_block.dense_layer", "body.blocks.{i}.mlp.down"),
    *norm(f"{LAYER}.mlp_block.layer_norm", "body.blocks.{i}.norm2")))


def keymap(config: Any) -> KeyMap:
    head = KeyMap(dense("img.head", "image_head")) if hasattr(config.image_head, "out") else KeyMap(())
    return vision(config.vision.body.heads).at("img", "vision") + TEXT.at("txt", "text") + head + KeyMap((
        *dense("txt.head", "text_head"), rule("t", "log_scale", one)))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes; BERT's heads are 64 wide."""
    image, side = tower(state, "img.", "config.vision")
    table, first = f"txt.{BERT}.embedder.embedders_{{}}_ids.embedding", f"txt.{LAYER.replace('{i}', '0')}"
    vocab, width, dim = size(state, table.format("token")), size(state, table.format("token"), 1), size(state, "txt.head.kernel", 1)
    out = image | {
        "config.text.vocab": vocab, "config.text.length": size(state, table.format("position")),
        "config.text.kinds": size(state, table.format("segment")), "config.text.norm_pre.eps": EPS,
        "config.text_head.into": width, "config.text_head.out": dim, "feed.image.size": side, "feed.text.vocab": vocab,
        **body("config.text.body", width=width, depth=count_named(state, rf"txt\.{BERT}\..*\.layers_(\d+)\.mlp_block\.layer_norm\.scale"),
               heads=max(1, width // HEAD), hidden=size(state, f"{first}.mlp_block.mlp.dense_layer.kernel", 1), act="gelu_new", eps=EPS, final=False)}
    if "img.head.kernel" in state:
        into, to = (size(state, "img.head.kernel", axis) for axis in (0, 1))
        out["config.image_head"] = from_dict({"is": "polysense.nn.head:LinearBias.Config", "into": into, "out": to})
    return "paper", out


def write(config: Any) -> Dict:
    """Nothing: the shapes say all. UserError for a system that these files cannot hold."""
    checked(config.vision, "official")
    of, t = body_of(config.text.body, "official"), config.text
    if of["act"] != ACT or of["eps"] != EPS or t.norm_pre.eps != EPS or t.body.norm is not None or t.pooler is not None or not t.kinds or t.pad \
            or of["heads"] != max(1, of["width"] // HEAD):
        raise UserError(f"these files mean a BERT with GELU by tanh, eps {EPS} and heads {HEAD} wide", "keep the run folder")
    return {}


LAYOUT = Layout(of="lit", name="official", keymap=keymap, read=read, write=write, config_file="", weights_file="lit.npz")
