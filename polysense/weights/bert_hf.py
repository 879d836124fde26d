"""BERT as transformers publishes it, for systems that stand on its text tower: BertModel, and the tower inside models with heads."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, both, lead1, rule
from polysense.weights.sizes import Dict, act_name, body, body_of

LAYER = "encoder.layer.{i}"
TEXT = KeyMap((
    rule("embeddings.word_embeddings.weight", "embed.weight"), rule("embeddings.position_embeddings.weight", "position", lead1),
    rule("embeddings.token_type_embeddings.weight", "kind.weight"), *both("embeddings.LayerNorm", "norm_pre"),
    *(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{LAYER}.attention.self.{t}", f"body.blocks.{{i}}.attn.{o}")),
    *both(f"{LAYER}.attention.output.dense", "body.blocks.{i}.attn.out"), *both(f"{LAYER}.attention.output.LayerNorm", "body.blocks.{i}.norm1"),
    *both(f"{LAYER}.intermediate.dense", "body.blocks.{i}.mlp.up"), *both(f"{LAYER}.output.dense", "body.blocks.{i}.mlp.down"),
    *both(f"{LAYER}.output.LayerNorm", "body.blocks.{i}.norm2"),
), drop=(r"embeddings\.position_ids", r"cls\..*"), alias=(
    # inside BertForMaskedLM and its like; and the names of 2018, which bert-base-uncased still has
    ("bert.{rest}", "{rest}"), ("{rest}LayerNorm.gamma", "{rest}LayerNorm.weight"), ("{rest}LayerNorm.beta", "{rest}LayerNorm.bias")))


def keymap(config: Any) -> KeyMap:
    """The table for a `Bert.Config`: its pooler is loaded where ours has one, dropped where not."""
    if config.pooler is None:
        return TEXT + KeyMap((), drop=(r"(bert\.)?pooler\..*",))
    return TEXT + KeyMap(both("pooler.dense", "pooler.pre"))


def sizes(config: Dict, at: str) -> Dict:
    """Overrides of a `Bert.Config` at a dotted path from transformers' BERT configuration."""
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise UserError("this BERT is a decoder or has relative positions", "only the encoder with absolute positions is read")
    eps = config.get("layer_norm_eps", 1e-12)
    return {f"{at}.vocab": config.get("vocab_size", 30522), f"{at}.length": config.get("max_position_embeddings", 512),
            f"{at}.pad": config.get("pad_token_id", 0), f"{at}.kinds": config.get("type_vocab_size", 2), f"{at}.norm_pre.eps": eps,
            **body(f"{at}.body", width=config.get("hidden_size", 768), depth=config.get("num_hidden_layers", 12),
                   heads=config.get("num_attention_heads", 12), hidden=config.get("intermediate_size", 3072), act=config.get("hidden_act", "gelu"),
                   eps=eps, final=False)}


def write(config: Any) -> Dict:
    """`config.json` of a BertModel from a `Bert.Config`."""
    of = body_of(config.body, "hf")
    if config.body.norm is not None or config.norm_pre.eps != of["eps"]:
        raise UserError("transformers' BERT has post-norm blocks, no final norm and one eps", "keep the run folder")
    return {"architectures": ["BertModel"], "model_type": "bert", "dtype": "float32", "vocab_size": config.vocab, "pad_token_id": config.pad,
            "max_position_embeddings": config.length, "type_vocab_size": config.kinds, "hidden_size": of["width"], "num_hidden_layers": of["depth"],
            "num_attention_heads": of["heads"], "intermediate_size": of["hidden"], "hidden_act": act_name(of["act"], "hf"),
            "layer_norm_eps": of["eps"]}
