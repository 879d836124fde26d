"""Mamba as transformers publishes it (MambaForCausalLM), and the authors' own names for the same."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, size

MIX, OURS = "backbone.layers.{i}.mixer", "language.blocks.{i}.mixer"
TABLE = KeyMap((
    rule("backbone.embeddings.weight", "language.embed.weight"), rule("backbone.norm_f.weight", "language.norm.weight"),
    rule("backbone.layers.{i}.norm.weight", "language.blocks.{i}.norm.weight"),
    rule(f"{MIX}.A_log", f"{OURS}.decay"), rule(f"{MIX}.D", f"{OURS}.through"), *both(f"{MIX}.conv1d", f"{OURS}.conv"),
    rule(f"{MIX}.in_proj.weight", f"{OURS}.into.weight"), rule(f"{MIX}.out_proj.weight", f"{OURS}.out.weight"),
    rule(f"{MIX}.x_proj.weight", f"{OURS}.select.low.weight"), *both(f"{MIX}.dt_proj", f"{OURS}.select.step"),
), drop=(r"lm_head\.weight",), alias=(("backbone.embedding.weight", "backbone.embeddings.weight"),))          # the head is the embedding


def keymap(config: Any) -> KeyMap:
    """A language model of selective blocks."""
    if not hasattr(config.language.block.mixer.select, "rank"):
        raise UserError("the ablation without selection has no published layout", "keep the run folder")
    return TABLE


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides), all from the shapes."""
    mix = "backbone.layers.0.mixer"
    width, states = size(state, "backbone.layers.0.norm.weight"), size(state, f"{mix}.A_log", 1)
    words = next((k for k in ("backbone.embeddings.weight", "backbone.embedding.weight") if k in state), "backbone.embeddings.weight")
    if f"{mix}.in_proj.bias" in state or f"{mix}.conv1d.bias" not in state:
        raise UserError("this Mamba has biases that ours has not, or lacks those of the convolutions", "only the published form is read")
    at = "config.language.block.mixer"
    return "paper", {"config.language.vocab": size(state, words), "config.language.width": width,
                     "config.language.depth": count(state, "backbone.layers"),
                     "config.language.block.norm.eps": config.get("layer_norm_epsilon", 1e-5), f"{at}.expand": size(state, f"{mix}.A_log") // width,
                     f"{at}.states": states, f"{at}.kernel": size(state, f"{mix}.conv1d.weight", 2),
                     f"{at}.select.rank": size(state, f"{mix}.dt_proj.weight", 1), "feed.text.vocab": size(state, words)}


def write(config: Any) -> Dict:
    """`config.json` of a MambaForCausalLM."""
    c, mix = config.language, config.language.block.mixer
    inner = mix.expand * c.width
    return {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "dtype": "float32", "vocab_size": c.vocab, "hidden_size": c.width,
            "num_hidden_layers": c.depth, "state_size": mix.states, "expand": mix.expand, "intermediate_size": inner, "conv_kernel": mix.kernel,
            "time_step_rank": mix.select.rank or -(-inner // 32), "layer_norm_epsilon": c.block.norm.eps, "use_bias": False, "use_conv_bias": True,
            "hidden_act": "silu", "tie_word_embeddings": True}


LAYOUT = Layout(of="mamba", name="hf", keymap=keymap, read=read, write=write)
