"""Latent diffusion as it is published: a folder of a diffusers StableDiffusionPipeline, and the original `.ckpt` of one file."""
from typing import Any

from polysense.base.errors import UserError
from polysense.base.spec import from_dict
from polysense.weights import clip_hf, clip_openai, kl_vae, open_text, unet_compvis, unet_diffusers
from polysense.weights.keymap import KeyMap, State, rename
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, body_of, count, image_feed, size, within
from polysense.weights.unet_sizes import LATENT, norm, read_schedule, read_unet, square, write_schedule, write_unet

OWN = (r"log_noise", r"(critic|perceptual)\..*", r"word")              # said in a configuration file, or needed in training only
SCHEDULE = (r"(model_ema|loss)\..*",
            r"(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar|scale_factor)")
TEXT_PARTS = ("embeddings", "encoder", "final_layer_norm")


def text_map(theirs: str) -> KeyMap:
    """CLIP's text tower below `theirs`, with or without transformers 4's `text_model.`; it is written with it."""
    return clip_hf.TEXT.at(f"{theirs}.text_model", "text") + KeyMap((), alias=tuple(
        (f"{theirs}.{part}.{{rest}}", f"{theirs}.text_model.{part}.{{rest}}") for part in TEXT_PARTS))


def diffusers_map(config: Any) -> KeyMap:
    return (unet_diffusers.keymap(config.unet).at("unet", "unet") + kl_vae.diffusers().at("vae", "vae") + text_map("text_encoder")
            + KeyMap((), own=OWN))


def open_clip_map(depth: int) -> KeyMap:
    """Stable Diffusion 2's words in the original files: OpenCLIP's whole text tower, whose last block and head nobody reads. They are not written."""
    return clip_openai.TEXT.at("cond_stage_model.model", "text") + KeyMap((), drop=(
        rf"cond_stage_model\.model\.(transformer\.resblocks\.{depth}\..*|text_projection|logit_scale)",))


def original_map(config: Any) -> KeyMap:
    depth = config.text.body.depth
    words = (open_text.original(depth).at("cond_stage_model.transformer", "text") if hasattr(config.text, "pad") else
             text_map("cond_stage_model.transformer") if config.pad is None else open_clip_map(depth))
    return (unet_compvis.keymap(config.unet).at("model.diffusion_model", "unet") + kl_vae.original(config.vae).at("first_stage_model", "vae")
            + words
            + KeyMap((), drop=(*SCHEDULE, r"first_stage_model\.loss\..*", r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids"),
                     own=OWN))


def text_spec(vocab: int, length: int, width: int, depth: int, heads: int, hidden: int, act: str, eps: float, end: int | None) -> Any:
    ln: Dict = {"is": "polysense.nn.norm:LayerNorm.Config", "eps": eps}
    return from_dict({
        "is": "polysense.towers.clip_text:ClipText.Config", "vocab": vocab, "length": length, "end": end, "body": {
            "is": "polysense.nn.transformer:Transformer.Config", "width": width, "depth": depth, "heads": heads, "norm": ln,
            "init": {"is": "polysense.nn.init:ClipInit.Config"}, "block": {
                "is": "polysense.nn.block:PreNorm.Config", "norm": ln, "attn": {"is": "polysense.nn.attention:Attention.Config"},
                "mlp": {"is": "polysense.nn.mlp:MLP.Config", "hidden": hidden, "act": act}}}})


def read_diffusers(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) of a StableDiffusionPipeline's folder."""
    unet, vae = read_unet(within(config, "unet"), LATENT), kl_vae.read(within(config, "vae"))
    t: Dict = {**clip_hf.TEXT_DEFAULTS, **within(config, "text_encoder")}
    if t.get("model_type", "clip_text_model") != "clip_text_model":
        raise UserError(f"the text encoder is {t['model_type']!r}", "CLIP's is read")
    end = None if t["eos_token_id"] == clip_hf.LEGACY_EOS else t["eos_token_id"]
    acts = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
    if t["hidden_act"] not in acts:
        raise UserError(f"the text encoder has the activation {t['hidden_act']!r}", f"read are {', '.join(acts)}")
    text = text_spec(t["vocab_size"], t["max_position_embeddings"], t["hidden_size"], t["num_hidden_layers"], t["num_attention_heads"],
                     t["intermediate_size"], acts[t["hidden_act"]], t["layer_norm_eps"], end)
    pixels, pad = square(within(config, "unet")) * vae.stride, pad_of(config, end)
    return "paper", {"config.unet": unet, "config.vae": vae, "config.text": text, "config.size": pixels,
                     "config.scale": float(within(config, "vae").get("scaling_factor", 0.18215)), "config.pad": pad,
                     "feed.text.pad": "end" if pad is None else "zero", "feed.text.vocab": t["vocab_size"],
                     "feed.text.length": t["max_position_embeddings"],
                     **image_feed(pixels), **read_schedule(within(config, "scheduler"))}


def pad_of(config: Dict, end: int | None) -> int | None:
    """Stable Diffusion 2 pads with `!`, id 0; 1 with the end."""
    return 0 if within(config, "unet").get("cross_attention_dim", 768) == 1024 else None


def write_diffusers(config: Any) -> Dict:
    if config.scale is None:
        raise UserError("the scale of these latents was measured in training and stands in no configuration", "set config.scale to it, then export")
    t, end = config.text, config.text.end
    of = body_of(t.body, "diffusers")
    kinds = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    if end == clip_hf.LEGACY_EOS:
        raise UserError(f"in transformers an end token of id {end} means the largest id of the text", "keep the run folder")
    return {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None], "feature_extractor": [None, None],
            "requires_safety_checker": False, "pipeline": kinds,
            "unet": write_unet(config.unet, config.size // config.vae.stride), "vae": kl_vae.write(config.vae, config.size, config.scale),
            "scheduler": write_schedule(config, "DDIMScheduler"),
            "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": t.vocab, "hidden_size": of["width"],
                             "max_position_embeddings": t.length, "num_hidden_layers": of["depth"], "num_attention_heads": of["heads"],
                             "intermediate_size": of["hidden"], "hidden_act": act_name(of["act"], "hf"), "layer_norm_eps": of["eps"],
                             "projection_dim": of["width"], "eos_token_id": clip_hf.LEGACY_EOS if end is None else end,
                             "bos_token_id": 0, "pad_token_id": 1, "dtype": "float32"}}


def levels(state: State, heads: int | None) -> list[Dict]:
    """The levels of an original U-Net, read off its shapes, which do not show the number of heads; None: as many as make them 64 wide."""
    out: list[Dict] = [{"is": "polysense.nn.unet:Level", "width": 0, "depth": 0, "attn": None}]
    for n in range(1, count(state, "input_blocks")):
        if f"input_blocks.{n}.0.op.weight" in state:
            out.append({"is": "polysense.nn.unet:Level", "width": 0, "depth": 0, "attn": None})
            continue
        width, at = size(state, f"input_blocks.{n}.0.in_layers.2.weight"), f"input_blocks.{n}.1"
        out[-1] |= {"width": width, "depth": out[-1]["depth"] + 1}
        if f"{at}.proj_in.weight" in state:
            out[-1]["attn"] = transformer(state, at, width, heads)
    return out


def transformer(state: State, at: str, width: int, heads: int | None) -> Dict:
    source = size(state, f"{at}.transformer_blocks.0.attn2.to_k.weight", 1)
    return {"is": "polysense.nn.spatial:SpatialTransformer.Config", "heads": heads or width // 64, "source": source,
            "depth": count(state, f"{at}.transformer_blocks"), "norm": norm(32, 1e-6),
            "join": "conv" if state[f"{at}.proj_in.weight"].ndim == 4 else "linear"}


def clip_words(embed: Any, position: Any, depth: int, hidden: int, act: str) -> Any:
    vocab, width = embed.shape
    return text_spec(vocab, len(position), width, depth, max(1, width // 64), hidden, act, 1e-5, None)


def read_original(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) of an original `.ckpt`: sizes from the shapes, the rest is that of the preset `text2im` (the first text-to-image model,
    of 1.45 billion weights), `paper` (Stable Diffusion 1) or `version2`."""
    def below(prefix: str) -> State:
        return {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}

    unet, vae = below("model.diffusion_model"), below("first_stage_model")
    said, second = below("cond_stage_model.transformer"), below("cond_stage_model.model")
    if not said and not second:
        raise UserError("the text encoder of this file is neither the first model's, nor CLIP's as transformers names it, nor OpenCLIP's",
                        "the first text-to-image model and Stable Diffusion 1 and 2 are read")
    first = "token_emb.weight" in said
    for part in TEXT_PARTS:
        said = {rename(k, f"text_model.{part}.{{rest}}", f"{part}.{{rest}}"): v for k, v in said.items()}
    middle, out = "middle_block.1", size(unet, "out.2.weight")
    if first:
        text = open_text.from_original(said)
    elif second:
        depth, hidden = count(second, "transformer.resblocks") - 1, size(second, "transformer.resblocks.0.mlp.c_fc.weight")
        text = clip_words(second["token_embedding.weight"], second["positional_embedding"], depth, hidden, "gelu")
    else:
        depth, hidden = count(said, "encoder.layers"), size(said, "encoder.layers.0.mlp.fc1.weight")
        text = clip_words(said["embeddings.token_embedding.weight"], said["embeddings.position_embedding.weight"], depth, hidden, "quick_gelu")
    heads = None if second else 8
    found, channels = levels(unet, heads), size(unet, "input_blocks.0.0.weight", 1)
    net = from_dict({"is": "polysense.nn.unet:UNet.Config", "levels": found, "channels": channels, "out": 0 if out == channels else out,
                     "mid": transformer(unet, middle, found[-1]["width"], heads), "block": {"is": "polysense.nn.spatial:ResBlock.Config",
                                                                                        "norm": norm(32, 1e-5)}})
    scale: Dict = {"config.scale": float(state["scale_factor"])} if "scale_factor" in state else {}
    return "text2im" if first else "version2" if second else "paper", {
        "config.unet": net, "config.vae": kl_vae.from_original(vae), "config.text": text, "feed.text.vocab": text.vocab,
        "feed.text.length": text.length, **scale}


DIFFUSERS = Layout(of="latent_diffusion", name="diffusers", keymap=diffusers_map, read=read_diffusers, write=write_diffusers,
                   config_file="model_index.json", folders=(
                       ("unet", "config.json", "diffusion_pytorch_model.safetensors"), ("vae", "config.json", "diffusion_pytorch_model.safetensors"),
                       ("text_encoder", "config.json", "model.safetensors"), ("scheduler", "scheduler_config.json", "")))
ORIGINAL = Layout(of="latent_diffusion", name="original", keymap=original_map, read=read_original, write=lambda config: {}, config_file="")
