"""LLaMA and what shares its blocks (Vicuna, Mistral without its window) as transformers publishes them: LlamaForCausalLM.

Their rotary pairs are the two halves of a head, as ours, so queries and keys need no permutation; Meta's own files, whose pairs are
neighbours, do (`meta`).
"""
from typing import Any

from torch import Tensor

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Op, rule
from polysense.weights.sizes import Dict, act_name, within

LINES = (*((f"self_attn.{t}_proj", f"attn.{o}") for t, o in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))),
         *((f"mlp.{n}_proj", f"mlp.{n}") for n in ("gate", "up", "down")), ("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2"))
BODY = KeyMap((
    rule("embed_tokens.weight", "embed.weight"), rule("norm.weight", "body.norm.weight"),
    *(rule(f"layers.{{i}}.{t}.weight", f"body.blocks.{{i}}.{o}.weight") for t, o in LINES)), drop=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",))

DEFAULTS: Dict = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                  "tie_word_embeddings": False}


def keymap(config: Any) -> KeyMap:
    """The table for a `CausalLM.Config` of the LLaMA family."""
    if config.head is None:
        return BODY.at("model", "") + KeyMap((), drop=(r"lm_head\.weight",))
    return BODY.at("model", "") + KeyMap((rule("lm_head.weight", "head.weight"),))


def unpermute(heads: int) -> Op:
    """Rows of a query or key matrix, or of its bias, from neighbouring rotary pairs (Meta, EVA) to halves (ours), head by head."""
    def load(t: list[Tensor]) -> list[Tensor]:
        return [t[0].reshape(heads, -1, 2, *t[0].shape[1:]).transpose(1, 2).reshape(t[0].shape)]

    def save(t: list[Tensor]) -> list[Tensor]:
        return [t[0].reshape(heads, 2, -1, *t[0].shape[1:]).transpose(1, 2).reshape(t[0].shape)]
    return Op("unpermute_rope", load, save)


def meta(config: Any) -> KeyMap:
    """The table for Meta's own consolidated files of one part."""
    attn, heads = config.body.block.attn, config.body.heads
    lines = (("attention.wv", "attn.v"), ("attention.wo", "attn.out"), ("feed_forward.w1", "mlp.gate"), ("feed_forward.w3", "mlp.up"),
             ("feed_forward.w2", "mlp.down"), ("attention_norm", "norm1"), ("ffn_norm", "norm2"))
    return KeyMap((
        rule("tok_embeddings.weight", "embed.weight"), rule("norm.weight", "body.norm.weight"), rule("output.weight", "head.weight"),
        *(rule(f"layers.{{i}}.{t}.weight", f"body.blocks.{{i}}.{o}.weight") for t, o in lines),
        rule("layers.{i}.attention.wq.weight", "body.blocks.{i}.attn.q.weight", unpermute(heads)),
        rule("layers.{i}.attention.wk.weight", "body.blocks.{i}.attn.k.weight", unpermute(attn.kv_heads or heads))), drop=(r"rope\.freqs",))


def sizes(config: Dict, at: str) -> Dict:
    """Overrides of a LLaMA `CausalLM.Config` at a dotted path from transformers' configuration.

    Raises UserError for biases, scaled rotary positions and heads of another width, which this family has not.
    """
    c, rope = {**DEFAULTS, **config}, within(config, "rope_parameters")
    scaling = within(config, "rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" or c.get("attention_bias") or c.get("mlp_bias"):
        raise UserError(f"this LLaMA has rotary positions of type {kind!r} or biases", "only plain rotary positions without biases are read")
    width, heads, act = c["hidden_size"], c["num_attention_heads"], c["hidden_act"]
    if c.get("head_dim") not in (None, width // heads) or c["tie_word_embeddings"] or act != "silu":
        raise UserError("this LLaMA has heads of another width, a tied head or another activation than SiLU", "only the published form is read")
    kv, eps = c["num_key_value_heads"] or heads, c["rms_norm_eps"]
    return {f"{at}.vocab": c["vocab_size"], f"{at}.length": c["max_position_embeddings"], f"{at}.head.into": width, f"{at}.head.out": c["vocab_size"],
            f"{at}.body.width": width, f"{at}.body.depth": c["num_hidden_layers"], f"{at}.body.heads": heads,
            f"{at}.body.block.attn.kv_heads": None if kv == heads else kv, f"{at}.body.block.attn.rope.base": rope.get("rope_theta", c["rope_theta"]),
            f"{at}.body.block.mlp.hidden": c["intermediate_size"], f"{at}.body.block.norm.eps": eps, f"{at}.body.norm.eps": eps}


def write(config: Any) -> Dict:
    """`config.json` of a LlamaForCausalLM from a `CausalLM.Config`. Raises UserError for another family."""
    b = config.body
    rope = getattr(b.block.attn, "rope", None)
    if config.position is not None or config.head is None or rope is None or not hasattr(b.block.mlp, "hidden") or rope.share != 1.0:
        raise UserError("this language model is not of the LLaMA family", "export to the layout of its own family")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": config.vocab, "hidden_size": b.width,
            "intermediate_size": b.block.mlp.hidden or int(b.block.mlp.ratio * b.width), "num_hidden_layers": b.depth,
            "num_attention_heads": b.heads, "num_key_value_heads": b.block.attn.kv_heads or b.heads, "hidden_act": act_name(b.block.mlp.act, "hf"),
            "max_position_embeddings": config.length, "rms_norm_eps": b.block.norm.eps, "rope_theta": rope.base,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope.base}, "tie_word_embeddings": False, "attention_bias": False,
            "mlp_bias": False}
