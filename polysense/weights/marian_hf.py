"""Marian's translation models as transformers publishes them (MarianMTModel: Helsinki-NLP/opus-mt-...)."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, Op, Rule, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, body, body_of, size

row = Op("row", lambda t: [t[0].reshape(-1)], lambda t: [t[0][None]])                     # [1,V] -> [V]


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(r for t, o in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out")) for r in both(f"{theirs}.{t}", f"{ours}.{o}"))


def _half(of: str) -> tuple[Rule, ...]:
    layer, block = f"model.{of}.layers.{{i}}", f"language.{of}.blocks.{{i}}"
    cross = (*_attention(f"{layer}.encoder_attn", f"{block}.cross"), *both(f"{layer}.encoder_attn_layer_norm", f"{block}.norm_cross"))
    return (*_attention(f"{layer}.self_attn", f"{block}.attn"), *both(f"{layer}.self_attn_layer_norm", f"{block}.norm1"),
            *both(f"{layer}.fc1", f"{block}.mlp.up"), *both(f"{layer}.fc2", f"{block}.mlp.down"),
            *both(f"{layer}.final_layer_norm", f"{block}.norm2"), *(cross if of == "decoder" else ()))


TABLE = KeyMap((rule("model.shared.weight", "language.embed.weight"), rule("final_logits_bias", "language.correct.bias", row),
                *_half("encoder"), *_half("decoder")),
               drop=(r"model\.(en|de)coder\.embed_(tokens|positions)\.weight", r"lm_head\.weight"))      # copies of the embedding; sinusoids


def keymap(config: Any) -> KeyMap:
    """Only the form that Marian has: sinusoids in halves and a bias of the words."""
    if config.language.order != "halves" or config.language.correct is None:
        raise UserError("Marian's models have their sinusoids in two halves and a number for each word", "export the preset `marian`")
    return TABLE


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides)."""
    if not config.get("scale_embedding", False) or config.get("normalize_before") or config.get("share_encoder_decoder_embeddings") is False:
        raise UserError("this Marian does not scale its words, has its norms in front, or two vocabularies", "the usual form (opus-mt) is read")
    vocab, width, length = size(state, "model.shared.weight"), size(state, "model.shared.weight", 1), config.get("max_position_embeddings", 512)
    at, act = "config.language", config.get("activation_function", "swish")
    out: Dict = {f"{at}.vocab": vocab, f"{at}.length": length, f"{at}.pad": config.get("pad_token_id", vocab - 1),
                 f"{at}.start": config.get("decoder_start_token_id", vocab - 1), f"{at}.dropout": config.get("dropout", 0.1),
                 f"{at}.correct": from_dict({"is": "polysense.towers.translator:WordBias.Config", "vocab": vocab}),
                 "config.end": config.get("eos_token_id", 0), "feed.text.vocab": vocab, "feed.text.length": length}
    for half in ("encoder", "decoder"):
        out |= body(f"{at}.{half}", width=width, depth=config.get(f"{half}_layers", 6), heads=config.get(f"{half}_attention_heads", 8),
                    hidden=config.get(f"{half}_ffn_dim", 2048), act="silu" if act == "swish" else act, eps=1e-5, final=False)
    return "marian", out


def write(config: Any) -> Dict:
    """`config.json` of a MarianMTModel."""
    keymap(config)
    c = config.language
    if any(block.cross is None for block in (c.decoder.block,)) or c.encoder.norm is not None or c.decoder.norm is not None:
        raise UserError("Marian's decoder reads its source, and there is no final norm", "keep the run folder")
    one, two = body_of(c.encoder, "marian"), body_of(c.decoder.but(block=c.decoder.block.but(cross=None)), "marian")
    if (one["act"], one["eps"]) != (two["act"], two["eps"]) or one["eps"] != 1e-5:
        raise UserError("Marian's halves have one activation and an eps of 1e-5", "keep the run folder")
    act = act_name(one["act"], "marian")
    out: Dict = {f"{half}_{key}": of[ours] for half, of in (("encoder", one), ("decoder", two))
                 for key, ours in (("layers", "depth"), ("attention_heads", "heads"), ("ffn_dim", "hidden"))}
    return out | {"architectures": ["MarianMTModel"], "model_type": "marian", "dtype": "float32", "is_encoder_decoder": True, "vocab_size": c.vocab,
                  "decoder_vocab_size": c.vocab, "d_model": one["width"], "max_position_embeddings": c.length, "pad_token_id": c.pad,
                  "decoder_start_token_id": c.start, "eos_token_id": config.end, "forced_eos_token_id": config.end, "dropout": c.dropout,
                  "activation_function": "swish" if act == "silu" else act, "scale_embedding": True, "share_encoder_decoder_embeddings": True,
                  "tie_word_embeddings": True}


LAYOUT = Layout(of="transformer", name="marian", keymap=keymap, read=read, write=write)
