"""VLMo as released (unilm): `vlmo_base_patch16_224.pt`, the pre-trained model with its heads.

Their sequence is [text; image], ours [image; text]: attention knows no order, so only names differ. The tables of relative positions of all layers
stand side by side in one parameter, as here. The visual tokenizer and the token of hidden patches are not in the file.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Rule, State, both, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, image_feed, side, size

TABLE, THEIRS, OURS, REACH = "relative_position_bias_table", "transformer.blocks.{i}", "net.body.blocks.{i}", 196
EXPERTS = (("imag", "image"), ("text", "text"), ("vl", "pair"))


def _block() -> tuple[Rule, ...]:
    return (rule(f"{THEIRS}.attn.qkv.weight", tuple(f"{OURS}.attn.{n}.weight" for n in "qkv"), stack3),
            *(rule(f"{THEIRS}.attn.{n}_bias", f"{OURS}.attn.{n}.bias") for n in "qv"), *both(f"{THEIRS}.attn.proj", f"{OURS}.attn.out"),
            *both(f"{THEIRS}.norm1", f"{OURS}.norm1"), *(rule(f"{THEIRS}.gamma_{n}", f"{OURS}.scale{n}") for n in (1, 2)),
            *(r for t, o in EXPERTS for r in (*both(f"{THEIRS}.norm2_{t}", f"{OURS}.{o}.norm"), *both(f"{THEIRS}.mlp_{t}.fc1", f"{OURS}.{o}.mlp.up"),
                                              *both(f"{THEIRS}.mlp_{t}.fc2", f"{OURS}.{o}.mlp.down"))))


KEYS = KeyMap((
    *_block(), rule("transformer.cls_token", "net.image.cls"), *both("transformer.patch_embed.proj", "net.image.patch"),
    *both("transformer.norm", "net.body.norm"), rule(TABLE, "net.body.relative.table"), rule("token_type_embeddings.weight", "net.kind.weight"),
    *(rule(f"text_embeddings.{t}_embeddings.weight", f"net.text.{o}.weight") for t, o in (("word", "embed"), ("token_type", "kind"))),
    *both("text_embeddings.LayerNorm", "net.text.norm"), *both("pooler.dense", "pooler.pre"), *both("itm_score.fc", "match_head"),
    *both("mlm_score.transform.dense", "words.pre"), *both("mlm_score.transform.LayerNorm", "words.norm"),
    rule("mlm_score.decoder.weight", "words.table"), rule("mlm_score.bias", "words.bias"),
    *(rule(f"itc_{a}{n}_proj.fc.weight", f"{b}{o}_head.weight") for a, b in (("", ""), ("vl_", "fused_")) for n, o in (
        ("image", "image"), ("text", "text"))), rule("logit_scale", "log_scale"), rule("logit_vl_scale", "fused_log_scale")),
    # positions are relative: those of the text embeddings are in the file, and not read
    drop=(r"text_embeddings\.position_(ids|embeddings\.weight)", r"(text_|text_imag_)?relative_position_index"),
    own=(r"(target|hide|codes|answer)\..*",))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    depth, wide = count(state, "transformer.blocks"), size(state, "transformer.patch_embed.proj.weight")
    if TABLE not in state or "transformer.blocks.0.gamma_1" not in state:
        raise UserError("this VLMo has absolute positions or no layer scale (base plus)", "base and large are read")
    patch, grid = size(state, "transformer.patch_embed.proj.weight", 3), (side(size(state, TABLE), 5 + 2 * REACH) + 1) // 2
    vocab = size(state, "text_embeddings.word_embeddings.weight")
    length = min(REACH, size(state, "text_embeddings.position_embeddings.weight") if "text_embeddings.position_embeddings.weight" in state else 40)
    body, heads = "config.net.body", size(state, TABLE, 1) // depth
    fused = sum(f"transformer.blocks.{i}.mlp_vl.fc1.weight" in state for i in range(depth))
    project = {f"config.{n}_head.{k}": wide for n in ("image", "text", "fused_image", "fused_text") for k in ("into", "out")}
    return "paper", {
        f"{body}.width": wide, f"{body}.depth": depth, f"{body}.heads": heads, f"{body}.fused": fused, f"{body}.relative.grid": (grid, grid),
        f"{body}.block.mlp.hidden": size(state, "transformer.blocks.0.mlp_imag.fc1.weight"), "config.net.image.size": grid * patch,
        "config.net.image.patch": patch, "config.net.text.vocab": vocab, "config.net.text.length": length,
        "config.hide_text.vocab": vocab, "config.words.vocab": vocab,
        **project, "config.pooler.into": wide, "config.pooler.hidden": wide, "config.match_head.into": wide,
        "config.sampler.hidden": round(75 / 196 * grid * grid), "config.sampler.least": max(1, round(16 / 196 * grid * grid)),
        "config.target.size": grid * 8, "feed.text.vocab": vocab, "feed.text.length": length, **image_feed(grid * patch)}


def write(config: Any) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    body = config.net.body
    if body.relative is None or body.relative.reach != REACH or body.block.layer_scale is None or body.norm.eps != 1e-6 or config.net.kinds != 2:
        raise UserError("the authors' VLMo cannot hold this system",
                        f"its positions are relative and reach {REACH} tokens, its branches are scaled, eps is 1e-6")
    return {}


LAYOUT = Layout(of="vlmo", name="unilm", keymap=lambda config: KEYS, read=read, write=write, config_file="", weights_file="vlmo.pt")
