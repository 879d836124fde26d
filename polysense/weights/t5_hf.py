"""T5 and FlanT5 as transformers publishes them: T5ForConditionalGeneration. Only the first block of each half bears the table of distances."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Rule, rule
from polysense.weights.sizes import Dict

FIRST = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _attention(theirs: str, ours: str, norm: str) -> tuple[Rule, ...]:
    kind = "EncDecAttention" if ours.endswith("cross") else "SelfAttention"
    return (*(rule(f"{theirs}.{kind}.{t}.weight", f"{ours}.{o}.weight") for t, o in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))),
            rule(f"{theirs}.layer_norm.weight", f"{norm}.weight"))


def _half(of: str, last: int, gated: bool) -> tuple[Rule, ...]:
    layer, block = f"{of}.block.{{i}}.layer", f"{of}.blocks.{{i}}"
    mlp = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")) if gated else (("wi", "up"), ("wo", "down"))
    return (*_attention(f"{layer}.0", f"{block}.attn", f"{block}.norm1"),
            *(_attention(f"{layer}.1", f"{block}.cross", f"{block}.norm_cross") if last == 2 else ()),
            *(rule(f"{layer}.{last}.DenseReluDense.{t}.weight", f"{block}.mlp.{o}.weight") for t, o in mlp),
            rule(f"{layer}.{last}.layer_norm.weight", f"{block}.norm2.weight"), rule(f"{of}.final_layer_norm.weight", f"{of}.norm.weight"),
            rule(f"{of}.{FIRST}", f"{of}_bias.table"))


def gated(config: Any) -> bool:
    """Whether the blocks of a `Seq2Seq.Config` have a gated perceptron (T5 1.1, FlanT5)."""
    return config.encoder.block.mlp.owner.__name__ == "GatedMLP"


def keymap(config: Any) -> KeyMap:
    """The table for a `Seq2Seq.Config`. Files repeat the embedding; the oldest have a second table in the decoder that nothing reads."""
    head = () if config.head is None else (rule("lm_head.weight", "head.weight"),)
    return KeyMap((rule("shared.weight", "embed.weight"), *_half("encoder", 1, gated(config)), *_half("decoder", 2, gated(config)), *head),
                  drop=(r"(en|de)coder\.embed_tokens\.weight", r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
                        *(() if head else (r"lm_head\.weight",))))


def sizes(config: Dict, at: str) -> Dict:
    """Overrides of the `Seq2Seq.Config` of `flan_t5` at a dotted path from transformers' configuration.

    Raises UserError for a plain T5 of 2020 (ReLU, its embedding, scaled, as its head), whose blocks are of another kind. (transformers 5 writes
    every T5 as tied, and `scale_decoder_outputs` where that is meant.)
    """
    act, width, heads = config.get("feed_forward_proj", "relu"), config.get("d_model", 512), config.get("num_heads", 8)
    if act != "gated-gelu" or config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)):
        raise UserError(f"this T5 has {act!r} perceptrons or predicts words by its scaled embedding", "those of T5 1.1 and FlanT5 are read")
    out: Dict = {f"{at}.vocab": config.get("vocab_size", 32128), f"{at}.head.into": width, f"{at}.head.out": config.get("vocab_size", 32128),
                 f"{at}.buckets": config.get("relative_attention_num_buckets", 32),
                 f"{at}.furthest": config.get("relative_attention_max_distance", 128), f"{at}.start": config.get("decoder_start_token_id") or 0}
    layers, eps = config.get("num_layers", 6), config.get("layer_norm_epsilon", 1e-6)
    for half, depth in (("encoder", layers), ("decoder", config.get("num_decoder_layers") or layers)):
        body, block = f"{at}.{half}", f"{at}.{half}.block"
        out |= {f"{body}.width": width, f"{body}.depth": depth, f"{body}.heads": heads, f"{block}.attn.head_width": config.get("d_kv", 64),
                f"{block}.mlp.hidden": config.get("d_ff", 2048), f"{block}.norm.eps": eps, f"{body}.norm.eps": eps}
    return out | {f"{at}.decoder.block.cross.head_width": config.get("d_kv", 64)}


def write(config: Any) -> Dict:
    """`config.json` of a T5ForConditionalGeneration from a `Seq2Seq.Config`. Raises UserError for one that it cannot express."""
    a, b = config.encoder, config.decoder
    block, other = a.block, b.block
    act = {("MLP", "relu"): "relu", ("GatedMLP", "gelu_tanh"): "gated-gelu"}.get((block.mlp.owner.__name__, block.mlp.act))
    if act is None or block != other.but(cross=None) or a.heads != b.heads or other.cross != block.attn or block.norm.eps != a.norm.eps:
        raise UserError("T5 has two halves of one form, ReLU or a gated GELU", "keep the run folder")
    hidden = block.mlp.hidden or int(block.mlp.ratio * a.width)
    return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "dtype": "float32", "vocab_size": config.vocab, "d_model": a.width,
            "d_kv": block.attn.head_width or a.width // a.heads, "d_ff": hidden, "num_layers": a.depth, "num_decoder_layers": b.depth,
            "num_heads": a.heads, "relative_attention_num_buckets": config.buckets, "relative_attention_max_distance": config.furthest,
            "dropout_rate": block.dropout, "layer_norm_epsilon": block.norm.eps, "feed_forward_proj": act, "is_encoder_decoder": True,
            "tie_word_embeddings": config.head is None, "decoder_start_token_id": config.start, "pad_token_id": 0, "eos_token_id": 1}
