"""BLIP-2 as transformers publishes it: Blip2ForConditionalGeneration with OPT or FlanT5 (stage 2), and Blip2ForImageTextRetrieval (stage 1
without the caption loss). The EVA tower's `post_layernorm` is the trained norm of what the Q-Former reads."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.weights import opt_hf, t5_hf
from polysense.weights.keymap import KeyMap, Rule, State, both, lead1, rule, stack3
from polysense.weights.layout import Layout
from polysense.weights.sizes import ALL, Dict, act_name, body, body_of, count, hf_feed, single, size, to_hf_feed, within

VISION = KeyMap((
    rule("embeddings.class_embedding", "vision.cls"), rule("embeddings.position_embedding", "vision.position"),
    *both("embeddings.patch_embedding", "vision.patch"), *both("post_layernorm", "norm_vision"),
    *(rule(f"encoder.layers.{{i}}.self_attn.qkv.{p}", tuple(f"vision.body.blocks.{{i}}.attn.{n}.{p}" for n in "qkv"), stack3)
      for p in ("weight", "bias")),
    *both("encoder.layers.{i}.self_attn.projection", "vision.body.blocks.{i}.attn.out"),
    *(r for n in (1, 2) for r in both(f"encoder.layers.{{i}}.layer_norm{n}", f"vision.body.blocks.{{i}}.norm{n}")),
    *both("encoder.layers.{i}.mlp.fc1", "vision.body.blocks.{i}.mlp.up"), *both("encoder.layers.{i}.mlp.fc2", "vision.body.blocks.{i}.mlp.down")))


def _attention(theirs: str, ours: str, norm: str) -> tuple[Rule, ...]:
    return (*(r for t, o in (("query", "q"), ("key", "k"), ("value", "v")) for r in both(f"{theirs}.attention.{t}", f"{ours}.{o}")),
            *both(f"{theirs}.output.dense", f"{ours}.out"), *both(f"{theirs}.output.LayerNorm", norm))


LAYER, BLOCK = "encoder.layer.{i}", "blocks.{i}"
QFORMER = KeyMap((
    *both("layernorm", "norm_pre"), *_attention(f"{LAYER}.attention", f"{BLOCK}.attn", f"{BLOCK}.norm1"),
    *_attention(f"{LAYER}.crossattention", f"{BLOCK}.cross", f"{BLOCK}.norm_cross"),
    *(r for t, mlp, norm in (("", "mlp", "norm2"), ("_query", "mlp_query", "norm_query"))
      for r in (*both(f"{LAYER}.intermediate{t}.dense", f"{BLOCK}.{mlp}.up"), *both(f"{LAYER}.output{t}.dense", f"{BLOCK}.{mlp}.down"),
                *both(f"{LAYER}.output{t}.LayerNorm", f"{BLOCK}.{norm}")))))

TEXT = KeyMap((rule("embeddings.word_embeddings.weight", "qformer.embed.weight"),
               rule("embeddings.position_embeddings.weight", "qformer.position", lead1),
               *both("vision_projection", "align_heads.image_head"), *both("text_projection", "align_heads.text_head"),
               *both("itm_head", "align_heads.match_head")), drop=(r"embeddings\.position_ids",))


def speaker(language: Any) -> Any:
    """The layout of a language model's family."""
    return t5_hf if hasattr(language, "encoder") else opt_hf


def keymap(config: Any) -> KeyMap:
    """Of a model of one stage: with a language model, or with the heads of stage 1."""
    if (config.language is None) == (not config.dim) or config.words is not None:
        raise UserError("transformers has a BLIP-2 with a language model and one with matching heads, none with both or with the caption loss",
                        "export the parts from a configuration of one stage, or keep the run folder")
    rest = TEXT if config.language is None else speaker(config.language).keymap(config.language).at("language_model", "language") + KeyMap(
        both("language_projection", "to_language"))
    return VISION.at("vision_model", "") + QFORMER.at("qformer", "qformer") + KeyMap((rule("query_tokens", "qformer.query"),)) + rest


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`; fields that a file leaves out have transformers' defaults."""
    if config.get("model_type") not in ("blip-2", "blip_2"):
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}, not 'blip-2'",
                        "give the folder of a BLIP-2 model")
    v, q, t, tokens = within(config, "vision_config"), within(config, "qformer_config"), within(config, "text_config"), size(state, "query_tokens", 1)
    speaks = any(k.startswith("language_model.") for k in state)
    if speaks and t.get("model_type", "opt") not in ("opt", "t5"):
        raise UserError(f"this BLIP-2 speaks with {t.get('model_type')!r}", "those with OPT or FlanT5 are read")
    wide, image, eps, width = v.get("hidden_size", 1408), single(v.get("image_size", 224)), v.get("layer_norm_eps", 1e-6), q.get("hidden_size", 768)
    out: Dict = {
        "config.vision.image_size": image, "config.vision.patch": single(v.get("patch_size", 14)),
        **body("config.vision.body", width=wide, depth=count(state, "vision_model.encoder.layers"), heads=v.get("num_attention_heads", 16),
               hidden=v.get("intermediate_size", 6144), act=v.get("hidden_act", "gelu"), eps=eps, final=False),
        "config.norm.eps": eps, "config.qformer.queries": tokens, "config.qformer.width": width, "config.qformer.source": wide,
        "config.qformer.depth": count(state, "qformer.encoder.layer"), "config.qformer.heads": q.get("num_attention_heads", 12),
        "config.qformer.every": q.get("cross_attention_frequency", 2), "config.qformer.mlp.hidden": q.get("intermediate_size", 3072),
        "config.qformer.mlp.act": _act(q.get("hidden_act", "gelu")), "config.qformer.norm.eps": q.get("layer_norm_eps", 1e-12),
        **hf_feed(config, image)}
    if speaks:
        if t.get("model_type") == "t5":
            return "paper_t5", out | {**t5_hf.sizes(t, "config.language"), "config.qformer.vocab": 0, "config.end": t.get("eos_token_id", 1),
                                      "config.start": t.get("decoder_start_token_id") or 0, "config.qformer.pad": t.get("pad_token_id", 0)}
        out |= {**opt_hf.sizes(t, "config.language"), "config.qformer.vocab": 0, "config.prompt": (),
                "config.start": t.get("bos_token_id", 2), "config.end": t.get("eos_token_id", 2), "config.qformer.pad": t.get("pad_token_id", 1)}
        return "paper_opt", out
    vocab, length = (size(state, f"embeddings.{n}_embeddings.weight") for n in ("word", "position"))
    return "paper", out | {"config.qformer.vocab": vocab, "config.qformer.length": length, "config.dim": size(state, "text_projection.weight"),
                           "config.words": None, "feed.text.vocab": vocab, "feed.text.length": min(32, length)}


def _act(name: str) -> str:
    return body("x", width=0, depth=0, heads=0, hidden=0, act=name)["x.block.mlp.act"]


def write(config: Any) -> Dict:
    """`config.json` of either class."""
    keymap(config)
    v, of, q = config.vision, body_of(config.vision.body, "hf", biases=(ALL,)), config.qformer
    if v.prefix != 1 or v.norm_pre is not None or v.stem is not None or not v.patch_bias or config.layer != -1 or config.norm.eps != of["eps"]:
        raise UserError("transformers' BLIP-2 has the plain EVA tower, whose last block is read through a norm of its own eps", "keep the run folder")
    text: Dict = {"model_type": "opt"}
    if config.language is not None:
        text = {**speaker(config.language).write(config.language), "eos_token_id": config.end, "pad_token_id": q.pad}
        text |= {"decoder_start_token_id" if text["model_type"] == "t5" else "bos_token_id": config.start}
    return {
        "architectures": ["Blip2ForImageTextRetrieval" if config.language is None else "Blip2ForConditionalGeneration"], "model_type": "blip-2",
        "num_query_tokens": q.queries, "use_decoder_only_language_model": text["model_type"] == "opt",
        "dtype": "float32", "image_text_hidden_size": config.dim or 256,
        "image_token_index": None if config.language is None else config.language.vocab - 1, "text_config": text,
        "vision_config": {"model_type": "blip_2_vision_model", "image_size": single(v.image_size), "patch_size": v.patch, "hidden_size": of["width"],
                          "num_hidden_layers": of["depth"], "num_attention_heads": of["heads"], "intermediate_size": of["hidden"],
                          "hidden_act": act_name(of["act"], "hf"), "layer_norm_eps": of["eps"], "qkv_bias": True},
        "qformer_config": {"model_type": "blip_2_qformer", "hidden_size": q.width, "num_hidden_layers": q.depth, "num_attention_heads": q.heads,
                           "intermediate_size": q.mlp.hidden or int(q.mlp.ratio * q.width), "hidden_act": act_name(q.mlp.act, "hf"),
                           "layer_norm_eps": q.norm.eps, "cross_attention_frequency": q.every, "encoder_hidden_size": q.source, "pad_token_id": 0,
                           "vocab_size": q.vocab or 30522, "max_position_embeddings": q.length, "use_qformer_text_input": bool(q.vocab)}}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "BlipImageProcessor")


LAYOUT = Layout(of="blip2", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
