"""OPT as transformers publishes it: OPTForCausalLM. Its position table has two unused rows in front; its head is the embedding."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, both, rule
from polysense.weights.sizes import Dict, act_name, body, body_of

LAYER = "layers.{i}"
BODY = KeyMap((
    rule("embed_tokens.weight", "embed.weight"), rule("embed_positions.weight", "position.weight"), *both("final_layer_norm", "body.norm"),
    *(r for t, o in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"))
      for r in both(f"{LAYER}.self_attn.{t}", f"body.blocks.{{i}}.attn.{o}")),
    *both(f"{LAYER}.self_attn_layer_norm", "body.blocks.{i}.norm1"), *both(f"{LAYER}.final_layer_norm", "body.blocks.{i}.norm2"),
    *both(f"{LAYER}.fc1", "body.blocks.{i}.mlp.up"), *both(f"{LAYER}.fc2", "body.blocks.{i}.mlp.down")))

# the head repeats the embedding in some files; the bare decoder was published without "model."
TIED = KeyMap((), drop=(r"lm_head\.weight",), alias=(("decoder.{rest}", "model.decoder.{rest}"),))
OFFSET = 2


def keymap(config: Any) -> KeyMap:
    """The table for a `CausalLM.Config` of the OPT family."""
    return BODY.at("model.decoder", "") + TIED


def sizes(config: Dict, at: str) -> Dict:
    """Overrides of an OPT `CausalLM.Config` at a dotted path from transformers' configuration.

    Raises UserError for the post-norm form with a projected embedding, which only OPT-350M has.
    """
    width, length = config.get("hidden_size", 768), config.get("max_position_embeddings", 2048)
    if config.get("word_embed_proj_dim", width) != width or not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
        raise UserError("this OPT has a projected embedding or norms behind its branches (OPT-350M)", "the other sizes of OPT are read")
    return {f"{at}.vocab": config.get("vocab_size", 50272), f"{at}.length": length, f"{at}.position.length": length, f"{at}.position.offset": OFFSET,
            **body(f"{at}.body", width=width, depth=config.get("num_hidden_layers", 12), heads=config.get("num_attention_heads", 12),
                   hidden=config.get("ffn_dim", 3072), act=config.get("activation_function", "relu"), eps=1e-5)}


def write(config: Any) -> Dict:
    """`config.json` of an OPTForCausalLM from a `CausalLM.Config`. Raises UserError for another family."""
    if config.position is None or config.head is not None or config.position.offset != OFFSET or config.position.length != config.length:
        raise UserError("this language model is not of the OPT family", "export to the layout of its own family")
    of = body_of(config.body, "hf")
    if of["eps"] != 1e-5:
        raise UserError(f"OPT's norms have eps 1e-5, these {of['eps']}", "keep the run folder")
    return {"architectures": ["OPTForCausalLM"], "model_type": "opt", "dtype": "float32", "vocab_size": config.vocab, "hidden_size": of["width"],
            "word_embed_proj_dim": of["width"], "ffn_dim": of["hidden"], "num_hidden_layers": of["depth"], "num_attention_heads": of["heads"],
            "activation_function": act_name(of["act"], "hf"), "max_position_embeddings": config.length, "do_layer_norm_before": True,
            "tie_word_embeddings": True, "enable_bias": True, "layer_norm_elementwise_affine": True}
