"""BEiT-3 as released (unilm on torchscale): the pre-trained encoder, and the models tuned for one task each.

Every linear, norm and table exists twice, A for pictures and B for texts. A file has the encoder and the head of its task; what it has no name for
stays as it was at birth: heads of other tasks, the word head of a model for search, and the tokenizer's codes, are still to be learned.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights.keymap import KeyMap, Rule, State, both, lead1, rule
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, count, image_feed, side, size

THEIRS, OURS, HALVES = "beit3.encoder.layers.{i}", "net.body.blocks.{i}", (("A", "image"), ("B", "text"))


def _block(x: str, half: str) -> tuple[Rule, ...]:
    names = (*((f"self_attn.{n}_proj", f"attn.{n}") for n in "qkv"), ("self_attn.out_proj", "attn.out"), ("self_attn_layer_norm", "norm1"),
             ("self_attn.inner_attn_ln", "attn.norm_inner"), ("final_layer_norm", "norm2"))
    inside = (("fc1", "up"), ("fc2", "down"), ("ffn_layernorm", "norm_inner"))
    return (*(r for t, o in names for r in both(f"{THEIRS}.{t}.{x}", f"{OURS}.{half}.{o}")),
            *(r for t, o in inside for r in both(f"{THEIRS}.ffn.{x}.{t}", f"{OURS}.{half}.mlp.{o}")))


NET: tuple[Rule, ...] = (
    *(r for x, half in HALVES for r in (*_block(x, half), *both(f"beit3.encoder.layer_norm.{x}", f"net.body.norm.{half}"))),
    *(rule(f"beit3.encoder.embed_positions.{x}.weight", f"net.{half}.position", lead1) for x, half in HALVES),
    rule("beit3.text_embed.weight", "net.text.embed.weight"), rule("beit3.vision_embed.cls_token", "net.image.cls"),
    rule("beit3.vision_embed.mask_token", "hide.token"), *both("beit3.vision_embed.proj", "net.image.patch"))

HEADS: dict[str, tuple[Rule, ...]] = {
    "unilm": (),
    "unilm_retrieval": (rule("vision_head.weight", "image_head.weight"), rule("language_head.weight", "text_head.weight"),
                        rule("logit_scale", "log_scale")),
    "unilm_captioning": both("mlm_head", "words.out"),
    "unilm_vqa": (*both("pooler.norm", "pooler.norm"), *both("pooler.dense", "pooler.pre"), *both("head.0", "answer.pre"),
                  *both("head.1", "answer.norm"), *both("head.3", "answer.out")),
    "unilm_labels": (*both("fc_norm", "label.norm"), *both("head", "label.out")),
    "unilm_nlvr2": tuple(r for t, o in (("norm1", "norm1"), ("dense1", "pre"), ("norm2", "norm2"), ("dense2", "out"))
                         for r in both(f"head.{t}", f"reasoner.{o}"))}
PARTS = {"unilm_retrieval": ("image_head", "text_head", "log_scale"), "unilm_captioning": ("words",), "unilm_vqa": ("pooler", "answer"),
         "unilm_labels": ("label",), "unilm_nlvr2": ("reasoner",)}


def _keymap(name: str) -> KeyMap:
    parts = ("target", "codes", "words", "image_head", "text_head", "log_scale", "pooler", "answer", "label", "reasoner")
    rest = "|".join(p for p in parts if p not in PARTS.get(name, ()))
    return KeyMap((*NET, *HEADS[name]), own=(rf"({rest})(\..*)?", r"answer\.words"))


def _read(config: Dict, state: State, name: str) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes; heads are 64 wide."""
    wide, patch = size(state, "beit3.vision_embed.proj.weight"), size(state, "beit3.vision_embed.proj.weight", 3)
    if "beit3.encoder.layers.0.self_attn.inner_attn_ln.A.weight" not in state:
        raise UserError("this BEiT-3 has no inner norms", "the released base and large models have")
    grid, vocab = side(size(state, "beit3.encoder.embed_positions.A.weight"), 3), size(state, "beit3.text_embed.weight")
    body, length = "config.net.body", size(state, "beit3.encoder.embed_positions.B.weight") - 2
    mask = min(64_001, vocab - 1)
    out: Dict = {
        f"{body}.width": wide, f"{body}.depth": count(state, "beit3.encoder.layers"), f"{body}.heads": max(1, wide // 64),
        f"{body}.block.mlp.hidden": size(state, "beit3.encoder.layers.0.ffn.A.fc1.weight"), "config.net.image.size": grid * patch,
        "config.net.image.patch": patch, "config.net.text.vocab": vocab, "config.net.text.length": length, "config.words.vocab": vocab,
        **{f"config.{h}.{k}": v for h in ("hide_text", "hide_pair", "hide_caption") for k, v in (("vocab", vocab), ("mask", mask))},
        **{f"config.{h}_head.{k}": wide for h in ("image", "text") for k in ("into", "out")},
        "config.sampler.hidden": round(75 / 196 * grid * grid), "config.sampler.least": max(1, round(16 / 196 * grid * grid)),
        "config.target.size": 16 * grid, "feed.text.vocab": vocab, "feed.text.length": min(128, length), **image_feed(grid * patch)}
    out |= {f"{body}.norm": None} if "beit3.encoder.layer_norm.A.weight" not in state else {}
    if name in ("unilm", "unilm_retrieval", "unilm_captioning"):
        return "base", out
    out |= {"config.pooler.into": wide, "config.label.into": wide, "config.reasoner.into": 4 * wide, "config.reasoner.hidden": 2 * wide}
    if name == "unilm_vqa":
        out["config.answer.room"] = size(state, "head.3.weight")
    else:
        out["config.label.out" if name == "unilm_labels" else "config.reasoner.out"] = size(
            state, "head.weight" if name == "unilm_labels" else "head.dense2.weight")
    return "base_heads", out


def _write(config: Any, name: str) -> Dict:
    """Nothing but the check that the authors' code could hold this system."""
    net = config.net
    lost = [p for p in PARTS.get(name, ()) if p in ("pooler", "answer", "label", "reasoner") and getattr(config, p) is None]
    if lost or net.body.norms != "two" or net.image.skip != 2 or net.text.skip != 2 or net.body.block.norm.eps != 1e-5 \
            or net.body.heads != max(1, net.width // 64):
        raise UserError("the authors' BEiT-3 cannot hold this system" + (f": it has no {lost[0]}" if lost else ""),
                        "released are decoupled models with heads of width 64, positions from row 2 on, eps 1e-5")
    return {}


LAYOUTS = {name: Layout(of="beit_3", name=name, keymap=lambda config, name=name: _keymap(name), write=lambda config, name=name: _write(config, name),
                        read=lambda config, state, name=name: _read(config, state, name), config_file="", weights_file="beit3.pth")
           for name in HEADS}
