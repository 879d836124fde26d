"""The word encoder of the first text-to-image latent diffusion model, as diffusers names it (LDMBertModel) and as its authors' file does."""
from typing import Any

from polysense.base.spec import from_dict
from polysense.weights.keymap import KeyMap, State, both, lead1, rule
from polysense.weights.sizes import Dict, count, size

LAYER, OURS = "layers.{i}", "body.blocks.{i}"
DIFFUSERS = KeyMap((
    rule("embed_tokens.weight", "embed.weight"), rule("embed_positions.weight", "position", lead1), *both("layer_norm", "body.norm"),
    *(rule(f"{LAYER}.self_attn.{x}_proj.weight", f"{OURS}.attn.{x}.weight") for x in "qkv"), *both(f"{LAYER}.self_attn.out_proj", f"{OURS}.attn.out"),
    *both(f"{LAYER}.self_attn_layer_norm", f"{OURS}.norm1"), *both(f"{LAYER}.final_layer_norm", f"{OURS}.norm2"),
    *both(f"{LAYER}.fc1", f"{OURS}.mlp.up"), *both(f"{LAYER}.fc2", f"{OURS}.mlp.down"),
))


def original(depth: int) -> KeyMap:
    """The authors' file: a list of alternately attention and MLP, each with the norm before it; the head of its first training is not read."""
    def block(i: int) -> tuple[Any, ...]:
        attn, mlp, ours = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}", f"body.blocks.{i}"
        return (*both(f"{attn}.0", f"{ours}.norm1"), *(rule(f"{attn}.1.to_{x}.weight", f"{ours}.attn.{x}.weight") for x in "qkv"),
                *both(f"{attn}.1.to_out", f"{ours}.attn.out"), *both(f"{mlp}.0", f"{ours}.norm2"), *both(f"{mlp}.1.net.0.0", f"{ours}.mlp.up"),
                *both(f"{mlp}.1.net.2", f"{ours}.mlp.down"))
    return KeyMap((rule("token_emb.weight", "embed.weight"), rule("pos_emb.emb.weight", "position", lead1), *both("norm", "body.norm"),
                   *(r for i in range(depth) for r in block(i))), drop=(r"to_logits\..*",))


def spec(vocab: int, length: int, width: int, depth: int, heads: int, head_width: int, hidden: int, act: str = "gelu", pad: int = 0) -> Any:
    ln = {"is": "polysense.nn.norm:LayerNorm.Config", "eps": 1e-5}
    return from_dict({
        "is": "polysense.towers.open_text:OpenText.Config", "vocab": vocab, "length": length, "pad": pad, "body": {
            "is": "polysense.nn.transformer:Transformer.Config", "width": width, "depth": depth, "heads": heads, "norm": ln, "block": {
                "is": "polysense.nn.block:PreNorm.Config", "norm": ln,
                "attn": {"is": "polysense.nn.attention:Attention.Config", "bias": "out", "head_width": head_width},
                "mlp": {"is": "polysense.nn.mlp:MLP.Config", "hidden": hidden, "act": act}}}})


def from_original(state: State, head_width: int = 64) -> Any:
    """The encoder of a file's weights; no shape shows how wide a head is: 64 in what was released."""
    first: Dict = {k: size(state, f"attn_layers.layers.{k}") for k in ("0.1.to_q.weight", "1.1.net.0.0.weight")}
    return spec(size(state, "token_emb.weight"), size(state, "pos_emb.emb.weight"), size(state, "token_emb.weight", 1),
                count(state, "attn_layers.layers") // 2, max(1, first["0.1.to_q.weight"] // head_width), min(head_width, first["0.1.to_q.weight"]),
                first["1.1.net.0.0.weight"])
