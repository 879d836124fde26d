"""The first text-to-image latent diffusion model as diffusers publishes it: the folder of an LDMTextToImagePipeline."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import kl_vae, open_text, unet_diffusers
from polysense.weights.keymap import KeyMap, State
from polysense.weights.latent_diffusion import OWN
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict, act_name, body_of, image_feed, within
from polysense.weights.unet_sizes import LATENT, read_schedule, read_unet, square, write_schedule, write_unet

DEFAULTS: Dict = {"vocab_size": 30522, "max_position_embeddings": 77, "encoder_layers": 32, "encoder_ffn_dim": 5120, "encoder_attention_heads": 8,
                  "head_dim": 64, "activation_function": "gelu", "d_model": 1280, "pad_token_id": 0, "scale_embedding": False}


def keymap(config: Any) -> KeyMap:
    return (unet_diffusers.keymap(config.unet).at("unet", "unet") + kl_vae.diffusers().at("vqvae", "vae")
            + open_text.DIFFUSERS.at("bert.model", "text")
            + KeyMap((), drop=(r"bert\.to_logits\..*",), own=OWN))          # its first training's head, which nobody reads


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) of an LDMTextToImagePipeline's folder."""
    bert: Dict = {**DEFAULTS, **within(config, "bert")}
    if bert.get("model_type", "ldmbert") != "ldmbert" or bert["scale_embedding"]:
        raise UserError(f"the folder bert holds a {bert.get('model_type', 'ldmbert')!r}, scale_embedding={bert['scale_embedding']}",
                        "an LDMBertModel without scaled embeddings is read")
    unet, vae = read_unet(within(config, "unet"), LATENT), kl_vae.read(within(config, "vqvae"))
    text = open_text.spec(bert["vocab_size"], bert["max_position_embeddings"], bert["d_model"], bert["encoder_layers"],
                          bert["encoder_attention_heads"], bert["head_dim"], bert["encoder_ffn_dim"], bert["activation_function"],
                          bert["pad_token_id"])
    pixels = square(within(config, "unet")) * vae.stride
    return "text2im", {"config.unet": unet, "config.vae": vae, "config.text": text, "config.size": pixels, "config.pad": bert["pad_token_id"],
                       "config.scale": float(within(config, "vqvae").get("scaling_factor", 0.18215)), "feed.text.vocab": bert["vocab_size"],
                       "feed.text.length": bert["max_position_embeddings"], **image_feed(pixels), **read_schedule(within(config, "scheduler"))}


def write(config: Any) -> Dict:
    if config.scale is None:
        raise UserError("the scale of these latents was measured in training and stands in no configuration", "set config.scale to it, then export")
    attn, of = config.text.body.block.attn, body_of(config.text.body, "diffusers", biases=("out",))
    if not hasattr(config.text, "pad") or of["eps"] != 1e-5:
        raise UserError("the text tower is not that of the first model", "export to diffusers, as Stable Diffusion")
    kinds = {"unet": ["diffusers", "UNet2DConditionModel"], "vqvae": ["diffusers", "AutoencoderKL"], "bert": ["latent_diffusion", "LDMBertModel"],
             "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "BertTokenizer"]}
    return {"_class_name": "LDMTextToImagePipeline", "pipeline": kinds, "unet": write_unet(config.unet, config.size // config.vae.stride),
            "vqvae": kl_vae.write(config.vae, config.size, config.scale), "scheduler": write_schedule(config, "DDIMScheduler"),
            "bert": {"architectures": ["LDMBertModel"], "model_type": "ldmbert", "vocab_size": config.text.vocab, "d_model": of["width"],
                     "max_position_embeddings": config.text.length, "encoder_layers": of["depth"], "encoder_attention_heads": of["heads"],
                     "head_dim": attn.head_width or of["width"] // of["heads"], "encoder_ffn_dim": of["hidden"], "pad_token_id": config.text.pad,
                     "activation_function": act_name(of["act"], "hf"), "scale_embedding": False, "dtype": "float32"}}


LAYOUT = Layout(of="latent_diffusion", name="text2im", keymap=keymap, read=read, write=write, config_file="model_index.json", folders=(
    ("unet", "config.json", "diffusion_pytorch_model.safetensors"), ("vqvae", "config.json", "diffusion_pytorch_model.safetensors"),
    ("bert", "config.json", "model.safetensors"), ("scheduler", "scheduler_config.json", "")))
