"""LanguageBind as released: one checkpoint a modality, each a CLIP in transformers' names whose image side reads that modality.

With low-rank updates the encoder is wrapped by peft, so that its layers lie below `encoder.base_model.model`; files where they are merged do not.
Both are read. A system of several modalities has several such files: one is written at a time, so a system to be written has one.
"""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.plan import Feed
from polysense.base.spec import from_dict
from polysense.weights import clip_hf
from polysense.weights.clip_openai import text_sizes
from polysense.weights.keymap import KeyMap, Rule, State, both, rule, scalar
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, body, body_of, hf_feed, single, to_hf_feed, within

KINDS = {"image": "LanguageBindImage", "video": "LanguageBindVideo", "audio": "LanguageBindAudio", "depth": "LanguageBindDepth",
         "thermal": "LanguageBindThermal"}
PRESETS = {"image": "paper", "video": "paper_video", "audio": "paper_audio", "depth": "paper", "thermal": "paper_thermal"}
PEFT = "vision_model.encoder.base_model.model"
LINEARS = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"))


def spec(name: str, **values: Any) -> Any:
    return from_dict({"is": f"polysense.{name}.Config", **{k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in values.items()}})


def modality(config: Any) -> str:
    """The one modality of a system; UserError for several."""
    found = [m for m in KINDS if getattr(config, m) is not None]
    if len(found) != 1:
        raise UserError(f"this LanguageBind has towers for {', '.join(found)}", "the layout holds one modality a file: keep the run folder")
    return found[0]


def _time(layer: str, block: str) -> tuple[Rule, ...]:
    """What looks along time in a block."""
    return (rule(f"{layer}.temporal_embedding", f"{block}.position_time"), *both(f"{layer}.temporal_layer_norm1", f"{block}.norm_time"),
            *(r for t, o in LINEARS for r in both(f"{layer}.temporal_attn.{t}", f"{block}.attn_time.{o}")))


def _updates(layer: str, block: str) -> tuple[Rule, ...]:
    return tuple(rule(f"{layer}.{theirs}.{t}.lora_{n}.default.weight", f"{block}.{ours}.{o}.lora.default.{n}")
                 for theirs, ours in (("self_attn", "attn"), ("temporal_attn", "attn_time")) for t, o in LINEARS for n in "AB")


def keymap(config: Any) -> KeyMap:
    name = modality(config)
    own = getattr(config, name)
    tower, ours = KeyMap(_time("encoder.layers.{i}", "body.blocks.{i}") + _updates("encoder.layers.{i}", "body.blocks.{i}")), f"{name}.tower"
    image = (clip_hf.VISION + tower).at("vision_model", ours)
    alias = ((PEFT + ".{rest}", "vision_model.encoder.{rest}"), ("vision_model.{layer}.base_layer.{leaf}", "vision_model.{layer}.{leaf}"))
    whole = image + clip_hf.TEXT.at("text_model", "text") + KeyMap((
        rule("visual_projection.weight", f"{name}.head.weight"), rule("text_projection.weight", "text_head.weight"),
        rule("logit_scale", f"{name}.log_scale", scalar)))
    if own.adapter is None:
        return KeyMap(whole.rules, whole.drop, (*alias, *whole.alias))
    wrapped = tuple(Rule(tuple(t.replace("vision_model.encoder.", f"{PEFT}.") for t in r.theirs), r.ours, r.op) for r in whole.rules)
    back = (("vision_model.{layer}.base_layer.{leaf}", "vision_model.{layer}.{leaf}"),)
    return KeyMap(wrapped, whole.drop, (*back, *whole.alias))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from `config.json`, whose `model_type` says the modality."""
    name = next((m for m, kind in KINDS.items() if kind == config.get("model_type")), None)
    if name is None:
        raise UserError("config.json is missing" if not config else f"config.json is of model_type {config.get('model_type')!r}",
                        f"a file of LanguageBind is of one of {', '.join(KINDS.values())}")
    text: Dict = {**clip_hf.TEXT_DEFAULTS, "hidden_act": "gelu", **within(config, "text_config")}
    vision: Dict = {**clip_hf.VISION_DEFAULTS, "hidden_act": "gelu", **within(config, "vision_config")}
    dim, end = config.get("projection_dim", 768), text["eos_token_id"]
    sizes = text_sizes(text["vocab_size"], text["max_position_embeddings"], dim, width=text["hidden_size"], depth=text["num_hidden_layers"],
                       heads=text["num_attention_heads"], hidden=text["intermediate_size"], act=text["hidden_act"], eps=text["layer_norm_eps"])
    at, patch, image = f"config.{name}.tower", single(vision["patch_size"]), vision["image_size"]
    shape = body(f"{at}.body", width=vision["hidden_size"], depth=vision["num_hidden_layers"], heads=vision["num_attention_heads"],
                 hidden=vision["intermediate_size"], act=vision["hidden_act"], eps=vision["layer_norm_eps"])
    out: Dict = {f"config.{m}": None for m in KINDS if m != name} | sizes
    out |= {"config.text.end": None if end == clip_hf.LEGACY_EOS else end, "feed.text.pad": "end"}
    if name == "image":                      # no preset has it alone: the tower of `paper` without the others
        out |= {f"{at}.image_size": single(image), f"{at}.patch": patch}
    elif name == "video":
        out |= {f"{at}.image_size": single(image), f"{at}.patch": patch, f"{at}.body.block.frames": vision.get("num_frames", 8),
                "feed.video.frames": vision.get("num_frames", 8)}
    else:
        plane: tuple[int, int] = (vision["num_mel_bins"], vision["target_length"]) if name == "audio" else (single(image), single(image))
        out |= {f"{at}.tokens.size": plane, f"{at}.tokens.kernel": patch, f"{at}.tokens.stride": patch}
        if name == "audio":
            front = f"{at}.front"
            out |= {f"{front}.bins": plane[0], f"{front}.frames": plane[1], f"{front}.rate": vision.get("audio_sample_rate", 16_000),
                    f"{front}.mean": vision.get("audio_mean", -4.2677393), f"{front}.std": vision.get("audio_std", 4.5689974),
                    "feed.audio.rate": vision.get("audio_sample_rate", 16_000)}
    if name == "depth":
        out[f"{at}.front.far"] = float(vision.get("max_depth", 10))
    rank, updated = int(vision.get("lora_r", 0)), any(".lora_A." in k for k in state)
    if updated and name != "image":
        out |= {f"config.{name}.adapter.rank": rank or 1, f"config.{name}.adapter.alpha": float(vision.get("lora_alpha", 16))}
    elif name != "image":
        out[f"config.{name}.adapter"] = None
    out |= shape | {f"{at}.norm_pre.eps": vision["layer_norm_eps"], f"config.{name}.head.into": vision["hidden_size"], f"config.{name}.head.out": dim}
    if name == "audio":                      # its files say nothing about pictures
        return PRESETS[name], out
    return PRESETS[name], out | {k: v for k, v in hf_feed(config, single(image)).items() if "train_image" not in k}


def write(config: Any) -> Dict:
    """`config.json` of the one modality."""
    name = modality(config)
    own, text = getattr(config, name), body_of(config.text.body, "hf")
    tower, c, end = own.tower, own.adapter, config.text.end
    if end == clip_hf.LEGACY_EOS:
        raise UserError(f"in transformers an end token of id {end} means the largest id of the text", "keep the run folder")
    patch = getattr(tower, "patch", None) or tower.tokens.kernel
    size = getattr(tower, "image_size", None) or tower.tokens.size[0]
    plain = tower.body if name != "video" else tower.body.but(block=spec("nn.block:PreNorm", mlp=tower.body.block.mlp, norm=tower.body.block.norm))
    more: Dict = {"video": lambda: {"add_time_attn": True, "num_frames": tower.body.block.frames},
                  "audio": lambda: {"num_mel_bins": tower.tokens.size[0], "target_length": tower.tokens.size[1], "audio_mean": tower.front.mean,
                                    "audio_std": tower.front.std, "audio_sample_rate": tower.front.rate},
                  "depth": lambda: {"max_depth": tower.front.far}}.get(name, dict)()
    lora = {"lora_r": c.rank, "lora_alpha": c.rank if c.alpha is None else c.alpha} if c is not None else {"lora_r": 0}
    return {"model_type": KINDS[name], "architectures": [KINDS[name]], "projection_dim": config.text_head.out,
            "text_config": {"vocab_size": config.text.vocab, "max_position_embeddings": config.text.length, **clip_hf.sizes_of(text),
                            "eos_token_id": clip_hf.LEGACY_EOS if end is None else end},
            "vision_config": {"image_size": size, "patch_size": patch, "force_patch_dropout": own.sampler.ratio,
                              **clip_hf.sizes_of(body_of(plain, "hf")), **more, **lora}}


def feed(of: Feed) -> Dict:
    """`preprocessor_config.json`."""
    return to_hf_feed(of, "CLIPImageProcessor")


LAYOUT = Layout(of="languagebind", name="hf", keymap=keymap, read=read, write=write, feed=feed, beside=("preprocessor_config.json",))
