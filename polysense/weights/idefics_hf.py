"""Flamingo as transformers publishes the one it has: Idefics (IdeficsForVisionText2Text), a LLaMA with gated layers on CLIP's ViT."""
from typing import Any

import torch
from torch import Tensor

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights.clip_hf import VISION
from polysense.weights.keymap import KeyMap, Op, State, both, rule
from polysense.weights.layout import Layout
from polysense.weights.llama_hf import LINES
from polysense.weights.sizes import Dict, body, hf_feed, size, to_hf_feed, within

EYE, PARTS = "model.perceiver_resampler", "polysense.{}.Config"


def rows(first: int) -> Op:
    """Theirs are two tables, of the language model's words and of added ones; ours is one."""
    return Op("rows", lambda t: [torch.cat(t)], lambda t: [t[0][:first].clone(), t[0][first:].clone()])


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1)


def added(config: Any) -> int:
    """Words that are not of the language model: Idefics adds one around pictures and, last of all, that of a picture itself."""
    return 2 if config.image_token == config.language.vocab - 1 else 0


def keymap(config: Any) -> KeyMap:
    """The table for a Flamingo.Config of the published form."""
    blocks = config.language.body.block
    every = next((i for i, b in enumerate(blocks) if i and hasattr(b, "look")), len(blocks))
    gate, extra = blocks[0].look, added(config)
    numbers = Op("gate", lambda t: [_flat(t[0])], lambda t: [t[0].reshape(1, 1, -1) if gate.gates > 1 else t[0]])
    words = config.language.vocab - extra
    table = KeyMap((
        rule("model.embed_tokens.weight", "language.embed.weight") if not extra else
        rule(("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"), ("language.embed.weight",), rows(words)),
        rule("lm_head.weight", "language.head.weight") if not extra else
        rule(("lm_head.weight", "lm_head.additional_fc.weight"), ("language.head.weight",), rows(words)),
        rule("model.norm.weight", "language.body.norm.weight"),
        *(rule(f"model.layers.{{i}}.{t}.weight", f"language.body.blocks.{{i}}.{o}.weight") for t, o in LINES)),
        drop=(r".*\.rotary_emb\.inv_freq", r"model\.vision_model\.embeddings\.position_ids"))
    for i, block in enumerate(blocks):
        if hasattr(block, "look"):
            at, ours = f"model.gated_cross_attn_layers.{i // every}", f"language.body.blocks.{i}.look"
            names = [(f"cross_attn.{t}_proj", f"attn.{o}") for t, o in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))]
            names += [("cross_attn.q_layer_norm", "attn.norm_q"), ("cross_attn.k_layer_norm", "attn.norm_k")] if gate.attn.norm_qk else []
            names += [(f"mlp.{n}_proj", f"mlp.{n}") for n in ("gate", "up", "down")] + [("input_layernorm", "norm1"),
                                                                                     ("post_attention_layernorm", "norm2")]
            table += KeyMap((*(rule(f"{at}.{t}.weight", f"{ours}.{o}.weight") for t, o in names),
                             rule(f"{at}.alpha_cross_attn", f"{ours}.gate1", numbers), rule(f"{at}.alpha_dense", f"{ours}.gate2", numbers)))
    normed = config.resampler.layer.attn.norm_qk
    inner = (*both("context_layer_norm", "norm_source"), *both("latents_layer_norm", "norm1"),
             *((*both("q_layer_norm", "attn.norm_q"), *both("k_layer_norm", "attn.norm_k")) if normed else ()),
             *(rule(f"{t}_proj.weight", f"attn.{o}.weight") for t, o in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "out"))))
    outer = (*both("ln", "norm2"), rule("fc.weight", "mlp.up.weight"), rule("c_proj.weight", "mlp.down.weight"))
    return (table + KeyMap(inner).at(f"{EYE}.blocks.{{i}}.0", "resampler.layers.{i}")
            + KeyMap(outer).at(f"{EYE}.blocks.{{i}}.1", "resampler.layers.{i}")
            + KeyMap((rule(f"{EYE}.latents", "resampler.latents"), *both(f"{EYE}.layer_norm", "resampler.norm")))
            + VISION.at("model.vision_model", "vision.tower"))


def spec(name: str, **fields: Any) -> Dict:
    """The plain form of a part's configuration, by its module and class."""
    return {"is": PARTS.format(name), **fields}


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from transformers' `config.json`. Raises UserError for what has no resampler."""
    if config.get("model_type") != "idefics":
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'idefics'",
                        "give the folder of an IdeficsForVisionText2Text")
    v, p = within(config, "vision_config"), within(config, "perceiver_config")
    if not config.get("use_resampler", True) or not any(k.startswith(f"{EYE}.latents") for k in state):
        raise UserError("this Idefics has no resampler", "only those with one are Flamingos")
    width, depth, heads, eps = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], config.get("rms_norm_eps", 1e-6)
    eye, every, vocab = size(state, f"{EYE}.latents", 1), config.get("cross_layer_interval", 1), config["vocab_size"]
    extra, norm = config.get("additional_vocab_size", 0), spec("nn.norm:RMSNorm", eps=eps)
    mlp = spec("nn.mlp:GatedMLP", hidden=config["intermediate_size"])
    attn = spec("nn.attention:Attention", bias="", rope=spec("nn.rotary:Rotary"))
    cross = spec("nn.attention:Attention", bias="", norm_qk=norm if config.get("qk_layer_norms") else None)
    gates = size(state, "model.gated_cross_attn_layers.0.alpha_cross_attn", -1) if config.get("alpha_type") == "vector" else 1
    plain = {"attn": attn, "mlp": mlp, "norm": norm}
    gate = spec("connectors.gated_cross_attention:GatedCrossAttention", source=eye, attn=cross, mlp=mlp, norm=norm, gates=gates)
    gated, bare = spec("connectors.gated_cross_attention:GatedBlock", look=gate, **plain), spec("nn.block:PreNorm", **plain)
    body_ = spec("nn.transformer:Transformer", width=width, depth=depth, heads=heads, norm=norm,
                 block=[gated if i % every == 0 and i // every < depth // every else bare for i in range(depth)])
    language = spec("towers.causal_lm:CausalLM", vocab=vocab + extra, length=config.get("max_position_embeddings", 2048), body=body_,
                    head=spec("nn.head:Linear", into=width, out=vocab + extra, std=0.02))
    looks = spec("nn.attention:Attention", bias="", head_width=p.get("resampler_head_dim", 96),
                 norm_qk=spec("nn.norm:LayerNorm") if p.get("qk_layer_norms_perceiver") else None)
    layer = spec("connectors.perceiver_resampler:ResamplerLayer", attn=looks, mlp=spec("nn.mlp:MLP", act="relu", bias=""))
    resampler = spec("connectors.perceiver_resampler:PerceiverResampler", width=eye, depth=p.get("resampler_depth", 6), frames=0, layer=layer,
                     heads=p.get("resampler_n_heads", 16), latents=p.get("resampler_n_latents", 64))
    at, image, place = "config.vision.tower", v.get("image_size", 224), vocab + extra - 1 if extra else vocab - 2
    out: Dict = {
        "config.language": from_dict(language), "config.resampler": from_dict(resampler), "config.image_token": place, "config.vision.layer": -1,
        "config.vision.skip": 0, f"{at}.image_size": image, f"{at}.patch": v.get("patch_size", 14),
        f"{at}.norm_pre.eps": v.get("layer_norm_eps", 1e-5),
        **body(f"{at}.body", width=v.get("embed_dim", 768), depth=v.get("num_hidden_layers", 32), heads=v.get("num_attention_heads", 16),
               hidden=v.get("intermediate_size", 5120), act=v.get("hidden_act", "gelu"), eps=v.get("layer_norm_eps", 1e-5)),
        "feed.text.image": place, "feed.text.vocab": place}
    return "paper", out | {k: n for k, n in hf_feed(config, image).items() if not k.startswith("feed.train_image")}


def write(config: Any) -> Dict:
    """`config.json` of an IdeficsForVisionText2Text. Raises UserError for parts that Idefics has not."""
    c, r, extra = config.language, config.resampler, added(config)
    tower: Any = getattr(config.vision, "tower", None)
    kinds: Any = c.body.block
    blocks: list[Any] = list(kinds) if isinstance(kinds, tuple) else []  # pyright: ignore[reportUnknownArgumentType]
    gated = [i for i, b in enumerate(blocks) if hasattr(b, "look")]
    every = gated[1] if len(gated) > 1 else len(blocks)
    eye = getattr(tower, "norm_pre", None) is not None and config.vision.layer == -1 and config.vision.skip == 0
    if not eye or not gated or gated != list(range(0, len(blocks), every)) or r.frames or r.layer.mlp.act != "relu" \
            or blocks[0].look.mlp != blocks[0].mlp:
        raise UserError("Idefics reads all tokens of CLIP's ViT, single pictures, and has ReLU in its resampler", "keep the run folder")
    v, gate, attn = tower.body, blocks[0].look, r.layer.attn
    return {"architectures": ["IdeficsForVisionText2Text"], "model_type": "idefics", "dtype": "float32", "vocab_size": c.vocab - extra,
            "additional_vocab_size": extra, "hidden_size": c.body.width, "intermediate_size": gate.mlp.hidden, "num_hidden_layers": c.body.depth,
            "num_attention_heads": c.body.heads, "rms_norm_eps": gate.norm.eps, "hidden_act": "silu", "max_position_embeddings": c.length,
            "cross_layer_interval": every, "qk_layer_norms": gate.attn.norm_qk is not None, "alpha_type": "vector" if gate.gates > 1 else "float",
            "alpha_initializer": "zeros", "use_resampler": True, "tie_word_embeddings": False, "pad_token_id": 0, "vision_config": {
                "embed_dim": v.width, "image_size": tower.image_size, "patch_size": tower.patch, "num_hidden_layers": v.depth,
                "num_attention_heads": v.heads, "intermediate_size": v.block.mlp.hidden or int(v.block.mlp.ratio * v.width),
                "hidden_act": v.block.mlp.act, "layer_norm_eps": v.block.norm.eps},
            "perceiver_config": {"use_resampler": True, "resampler_n_latents": r.latents, "resampler_depth": r.depth, "resampler_n_heads": r.heads,
                                 "resampler_head_dim": attn.head_width, "qk_layer_norms_perceiver": attn.norm_qk is not None}}


def to_feed(feed: Any) -> Dict:
    return to_hf_feed(feed, "IdeficsImageProcessor")


LAYOUT = Layout(of="flamingo", name="idefics", keymap=keymap, read=read, write=write, feed=to_feed, beside=("preprocessor_config.json",))
